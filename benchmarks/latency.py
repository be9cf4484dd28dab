# SPDX-License-Identifier: Apache-2.0
"""How long a field of a stream takes, beside other ways to it on the same images, in one run.

``python -m benchmarks.latency [--input RECORDING] [--size nano] [--device cpu] [--threads N] [--json OUT]``

*stream*: ``FlowEstimator``, warm, a fixed number of iterations. *pairwise*: the stateless way in which the method's
release works, with the same weights. *unrolled*: a RAFT-style recurrent network, cold, of the same parts at their
fastest. And OpenCV's DIS and Farneback. Each makes an array (H, W, 2) float32 of arrays (H, W, 3) uint8.

The methods take turns on each pair of images, so whatever slows the machine down meets all alike. *Latency* is the time
from an image to its field. What the stream does between a field and the next image (``FlowEstimator.prepare``) counts
in *fields/s* and in *work*, the median over the pairs of the time of a method by that of the stream; *wait* is the same
of the latencies. The stream compared with is the shortest one within 0.1 px RMS of the longest pairwise run, or else
the nearest. *RMS* and *median* are distances from that run, px: over all pixels; of a pair's pixels, median of pairs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers import Method, Pairwise, Streamed, Unrolled, as_released, opencv
from benchmarks.report import write_json
from benchmarks.roofline import compare, measure_peaks, print_roofline, stage_work
from benchmarks.sequences import read_frames
from benchmarks.timeline import draw_timeline
from benchmarks.turns import NEAR_PX, nearest_stream, summarise, take_turns, tensor_mib
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.host import keep_freed_memory, machine, peak_memory_mb
from deq_flow_ros.model import DTYPES, SIZES, DEQFlow, available_models, load_model
from deq_flow_ros.model.weights import check_device
from deq_flow_ros.recordings import MediaError

PAIRWISE, UNROLLED = (24, 60), (12, 32)
KINDS = ("stream", "unrolled", "pairwise")
MIN_SIDE = 64
FIRST_SCENE_FRAME = 20
"""Where the rendered drive is on its way."""


def load_models(options: argparse.Namespace) -> tuple[DEQFlow, DEQFlow]:
    """The model, and once more in float32 with nothing folded; untrained where no weights are given or ship with it."""
    device, dtype = check_device(options.device), DTYPES[options.dtype]
    if is_trained(options):
        name = options.model or options.size
        return load_model(name, device, precision=options.dtype), load_model(name, device, fold=False)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(DEQFlow(options.size).to(device).eval().requires_grad_(False))
    return models[0].folded().requires_grad_(False).to(dtype), models[1]


def is_trained(options: argparse.Namespace) -> bool:
    """Whether there are weights for what is asked for."""
    return bool(options.model) or options.size in available_models()


def load_frames(options: argparse.Namespace) -> list[np.ndarray]:
    """As many frames as asked for, (H, W, 3) uint8 RGB, of the size asked for.

    :raises ValueError: if the recording has fewer.
    """
    count, size = options.warm_up + options.frames + 1, (options.width, options.height)
    if options.input is None:
        scene = Scene(SceneSettings(*size))
        return [scene.render(FIRST_SCENE_FRAME + number) for number in range(count)]
    frames = read_frames(options.input, count)
    if len(frames) < count:
        raise ValueError(
            f"{options.input}: expected {count} frames, for {options.warm_up} pairs to warm up and {options.frames} to "
            f"measure, got {len(frames)}; give smaller --warm-up and --frames"
        )
    return [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]


def print_methods(rows: Mapping[str, dict[str, Any]], ours: str, console: Console) -> None:
    """Latency, throughput, ratios and distances, one line each."""
    table = Table(
        title=f"latency of a field, ms; work and wait: by those of '{ours}'; distance, px", title_justify="left"
    )
    table.add_column("method", no_wrap=True)
    for column in ("pairs", "median", "p95", "p99", "fields/s", "work", "wait", "RMS", "median"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name, str(row["pairs"]), *(f"{row['latency_ms'][key]:.1f}" for key in ("median", "p95", "p99")),
            f"{row['fields_per_second']:.2f}", f"{row['work_by_ours']:.2f}x", f"{row['latency_by_ours']:.2f}x",
            f"{row['rms_px']:.3f}", f"{row['median_px']:.3f}", style="bold" if name == ours else None,
        )  # fmt: skip
    console.print(table)


def print_stages(report: dict[str, Any], console: Console) -> None:
    """Where the time of each kind of method goes, and what its tensors take."""
    table = Table(title="median ms by stage; the most memory of tensors, besides weights", title_justify="left")
    table.add_column("method", no_wrap=True)
    names = ("encode", "prepare", "match", "correlate", "iteration", "upsample", "output", "rest", "ahead")
    for column in (*names, "MiB"):
        table.add_column(column, justify="right")
    for name in (report["ours"], f"unrolled, {UNROLLED[0]}", f"pairwise, {PAIRWISE[0]}"):
        stages = report["methods"][name]["stage_ms"]
        cells = [f"{stages[stage]:.1f}" if stage in stages else "-" for stage in names]
        table.add_row(name, *cells, f"{report['tensor_mib'][name.split(',')[0]]:.0f}")
    console.print(table)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", help="bag, video or folder of images (default: a rendered drive)")
    parser.add_argument("--size", default="nano", choices=sorted(SIZES), help="model size (default nano)")
    parser.add_argument("--model", help="weights, by path (default: those that ship with the size; untrained if none)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and features (default float32)")
    parser.add_argument("--height", type=int, default=480, help="frames are resized to it (default 480)")
    parser.add_argument("--width", type=int, default=640, help="default 640")
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 3, 4], help="of streams (default 1 2 3 4)")
    parser.add_argument("--frames", type=int, default=40, help="pairs to measure (default 40)")
    parser.add_argument("--warm-up", type=int, default=5, help="pairs before, not measured (default 5)")
    parser.add_argument("--every", type=int, default=4, help="all but streams get each so-many-th pair (default 4)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch and OpenCV (default: theirs)")
    parser.add_argument("--timeline", type=Path, metavar="OUT", help="draw when the work is done (.svg, .png)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured.

    :raises ValueError: naming the option, what it may be, and what it was.
    """
    smallest = {"height": MIN_SIDE, "width": MIN_SIDE, "frames": 1, "warm_up": 1, "every": 1, "threads": 1}
    for name, least in smallest.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if min(options.iterations) < 1:
        raise ValueError(f"--iterations: expected at least 1 each, got {min(options.iterations)}")
    if options.timeline and options.timeline.suffix not in (".svg", ".png"):
        raise ValueError(f"--timeline: expected a name that ends in .svg or .png, got {options.timeline}")


def run(
    options: argparse.Namespace, model: DEQFlow, plain: DEQFlow, frames: list[np.ndarray], console: Console
) -> dict[str, Any]:
    """All figures. The memory comes first, as long as nothing is there that a method might keep and use again."""
    device, dtype = model.device, DTYPES[options.dtype]
    reference = as_released(plain)
    released = reference if dtype == torch.float32 else copy.deepcopy(reference).to(dtype)
    streams: dict[str, Method] = {f"stream, {n}": Streamed(model, n) for n in sorted(set(options.iterations))}
    unrolled: dict[str, Method] = {f"unrolled, {n}": Unrolled(model, n) for n in UNROLLED}
    pairwise: dict[str, Method] = {f"pairwise, {n}": Pairwise(released, n) for n in PAIRWISE}
    methods = {**streams, **unrolled, **opencv(), **pairwise}
    if dtype != torch.float32:
        methods[f"float32, {PAIRWISE[-1]}"] = Pairwise(reference, PAIRWISE[-1])
    with console.status("") as status:
        status.update("memory")
        short: tuple[Method, ...] = (Streamed(model, 1), Unrolled(model, 1), Pairwise(released, 1))
        memory = {kind: tensor_mib(method, frames, device) for kind, method in zip(KINDS, short, strict=True)}
        status.update("latency")
        samples = take_turns(methods, frames, options.warm_up, options.every, device)
        status.update("roofline")
        ours = nearest_stream(samples, methods)
        rows, iterations = summarise(samples, methods, ours), methods[ours].iterations
        works, peaks = stage_work(model, frames[0], frames[1], iterations), measure_peaks(device, dtype)
    return {
        "input": options.input or "rendered drive", "model": options.model or options.size,
        "trained": is_trained(options), "dtype": options.dtype, "height": options.height, "width": options.width,
        "device": machine() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "ours": ours, "iterations": iterations, "methods": rows,
        "tensor_mib": memory, "process_peak_mb": peak_memory_mb(),
        "roofline": compare(works, peaks, rows[ours]["stage_ms"], iterations),
    }  # fmt: skip


def print_report(report: dict[str, Any], console: Console) -> None:
    """The tables, and what has to be known to read them."""
    print_methods(report["methods"], report["ours"], console)
    print_stages(report, console)
    print_roofline(report["roofline"], report["ours"], console)
    console.print(
        f"{report['width']}x{report['height']}, {report['dtype']}, {torch.get_num_threads()} threads, "
        f"{report['device']}; process at most {report['process_peak_mb']:.0f} MB",
        highlight=False,
    )
    if not report["methods"][report["ours"]]["rms_px"] <= NEAR_PX:
        console.print(f"no stream is within {NEAR_PX:g} px RMS of the reference: the nearest one is compared with")
    if not report["trained"]:
        console.print(f"no weights of {report['model']} ship, these are untrained: the distances mean nothing")
    for name, row in report["methods"].items():
        if row["resets"]:
            console.print(f"{name}: the stream began anew at {row['resets']} pairs, which do not count")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = make_parser().parse_args(arguments)
    keep_freed_memory()  # as the node does; all methods have the good of it
    console = Console() if Console().is_terminal else Console(width=100)
    try:
        check_options(options)
        if options.threads:
            torch.set_num_threads(options.threads)
            cv2.setNumThreads(options.threads)
        model, plain = load_models(options)
        report = run(options, model, plain, load_frames(options), console)
    except (OSError, ValueError, RuntimeError, MediaError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    print_report(report, console)
    if options.timeline:
        draw_timeline(options.timeline, report["methods"][report["ours"]]["stage_ms"], report["iterations"])
    if options.json:
        write_json(options.json, model.device, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
