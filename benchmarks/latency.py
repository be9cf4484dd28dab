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
import math
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from rich.console import Console

from benchmarks.copies import count_copies
from benchmarks.peers import Method, Pairwise, Streamed, Unrolled, as_released, opencv
from benchmarks.report import Benchmark, Row, picture, table
from benchmarks.roofline import compare, measure_peaks, print_roofline, stage_work
from benchmarks.sequences import PERIOD_NS, read_frames
from benchmarks.turns import NEAR_PX, nearest_stream, summarise, take_turns, tensor_mib
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.host import keep_freed_memory, machine, peak_memory_mb
from deq_flow_ros.model import PRECISIONS, SIZES, DEQFlow, available_models, load_model
from deq_flow_ros.model.precision import INT8, number_type
from deq_flow_ros.model.weights import check_device
from deq_flow_ros.streaming import RUNTIMES, choose_runtime

PAIRWISE, UNROLLED = (24, 60), (12, 32)
KINDS = ("stream", "unrolled", "pairwise")
FIRST_SCENE_FRAME = 20
"""The frame of the rendered drive at which the camera moves at its usual speed."""
COLOURS = {
    "encode": "#2b6cb0", "prepare": "#2f855a", "match": "#4a5568", "correlate": "#805ad5", "iteration": "#dd6b20",
    "upsample": "#b83280", "output": "#a0aec0",
}  # fmt: skip


def load_models(options: argparse.Namespace) -> tuple[DEQFlow, DEQFlow]:
    """The model, and a second one in float32 with no layers folded. It is untrained if no weights are given and none
    ship for the size.
    """
    device, dtype = check_device(options.device), number_type(options.dtype)
    if is_trained(options):
        name = options.model or options.size
        return load_model(name, device, precision=options.dtype), load_model(name, device, fold=False)
    if options.dtype == INT8:
        raise ValueError(f"--dtype int8 needs weights, and none of {options.size} ship; give --model")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(DEQFlow(options.size).to(device).eval().requires_grad_(False))
    return models[0].folded().requires_grad_(False).to(dtype), models[1]


def is_trained(options: argparse.Namespace) -> bool:
    """Whether there are weights for the model that is asked for."""
    return bool(options.model) or options.size in available_models()


def load_frames(options: argparse.Namespace) -> list[np.ndarray]:
    """The number of frames asked for, (H, W, 3) uint8 RGB, in the size asked for.

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


def slower_runtimes(fastest: str) -> list[str]:
    """The other runtimes of a device, to be measured beside its fastest."""
    names = [name for name in RUNTIMES if name != "auto"]
    return names[: names.index(fastest)]


def print_methods(rows: Mapping[str, Row], ours: str, console: Console) -> None:
    """Print latency, throughput, ratios and distances, one line per method."""
    methods = table(
        f"latency of a field, ms; work and wait: by those of '{ours}'; distance, px",
        ["method"],
        ["pairs", "median", "p95", "p99", "fields/s", "work", "wait", "RMS", "median"],
    )
    for name, row in rows.items():
        latencies = [row["latency_ms"][key] for key in ("median", "p95", "p99")]
        methods.add_row(
            name, str(row["pairs"]), *(f"{ms:.{digits(ms)}f}" for ms in latencies),
            f"{row['fields_per_second']:.2f}", f"{row['work_by_ours']:.2f}x", f"{row['latency_by_ours']:.2f}x",
            f"{row['rms_px']:.3f}", f"{row['median_px']:.3f}", style="bold" if name == ours else None,
        )  # fmt: skip
    console.print(methods)


def print_stages(report: Row, console: Console) -> None:
    """Print how the time of each kind of method is divided among its stages, and how much memory its tensors take."""
    names = ("encode", "prepare", "match", "correlate", "iteration", "upsample", "output", "rest", "ahead")
    by_stage = table("median ms by stage; the most memory of tensors, besides weights", ["method"], [*names, "MiB"])
    runtimes = [name for name in report["copies"] if not name.startswith("stream")]
    for name in (report["ours"], *runtimes, f"unrolled, {UNROLLED[0]}", f"pairwise, {PAIRWISE[0]}"):
        stages = report["methods"][name]["stage_ms"]
        cells = [f"{stages[stage]:.{digits(stages[stage])}f}" if stage in stages else "-" for stage in names]
        memory = report["tensor_mib"].get(name.split(",")[0])
        by_stage.add_row(name, *cells, "-" if memory is None else f"{memory:.0f}")
    console.print(by_stage)
    for name, copies in report["copies"].items():
        if copies:
            console.print(f"{name}: per field {', '.join(f'{count} {kind}' for kind, count in copies.items())}")


def digits(ms: float) -> int:
    """Number of decimal places that a time is printed with; the short times of a GPU need more."""
    return 1 if ms >= 10 else 2


def draw_timeline(path: Path, stage_ms: Mapping[str, float], iterations: int, frames: int = 2) -> None:
    """Draw when the work on a frame is done, with the work ahead after the previous field, and with it at the arrival
    of the frame.

    :param stage_ms: the median times of a stream's stages; "ahead" is the work between a field and the next frame.
    """
    after = [(name, stage_ms[name]) for name in ("encode", "match", "correlate")]
    after += [("iteration", stage_ms["iteration"])] * iterations
    after += [("upsample", stage_ms["upsample"]), ("output", stage_ms["output"] + stage_ms["rest"])]
    ahead = ("prepare", stage_ms["ahead"])
    # The next frame is that one of a 30 Hz camera by which all is done.
    camera_ms = PERIOD_NS / 1e6
    period = camera_ms * math.ceil((sum(ms for _, ms in after) + ahead[1]) / camera_ms)
    with picture(path, 8, 2.4) as figure:
        axes = figure.subplots()
        axes.grid(False)
        for frame in range(frames):
            done = _draw(axes, 1, frame * period, after)
            _draw(axes, 1, done, [ahead])
            late = _draw(axes, 0, frame * period, [after[0], ahead, *after[1:]])
            for lane, end in ((1, done), (0, late)):
                axes.annotate(
                    f"field, {end - frame * period:.0f} ms", (end, lane + 0.28), (end, lane + 0.42), ha="center",
                    fontsize=8, arrowprops={"arrowstyle": "-|>", "linewidth": 0.6},
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
            axes.axvline(frame * period, color="#1a202c", linewidth=0.8, linestyle="--")
        for name, colour in COLOURS.items():
            axes.barh(0, 0, color=colour, label=name)
        axes.set(xlabel="ms; dashed: a frame arrives", ylim=(-0.4, 1.75), xlim=(-0.02 * period, frames * period))
        axes.set_yticks([1, 0], ["prepared\nbefore the frame", "prepared\nwith the frame"])
        figure.legend(frameon=False, loc="outside upper center", ncols=len(COLOURS), handlelength=1)


def _draw(axes: Axes, lane: int, start: float, parts: list[tuple[str, float]]) -> float:
    """Draw bars one after the other; returns where the last one ends."""
    for name, ms in parts:
        axes.barh(lane, ms, 0.5, left=start, color=COLOURS[name], edgecolor="white", linewidth=0.6)
        start += ms
    return start


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Measure everything. Memory comes first, while there is nothing yet that a method could keep and reuse."""
    model, plain = load_models(options)
    frames = load_frames(options)
    device, dtype = model.device, number_type(options.dtype)
    reference = as_released(plain)
    released = reference if dtype == torch.float32 else copy.deepcopy(reference).to(dtype)
    streams: dict[str, Method] = {f"stream, {n}": Streamed(model, n) for n in sorted(set(options.iterations))}
    most, fastest = max(options.iterations), choose_runtime("auto", device)[0]
    runtimes = {f"{name}, {most}": Streamed(model, most, name) for name in slower_runtimes(fastest)}
    unrolled: dict[str, Method] = {f"unrolled, {n}": Unrolled(model, n) for n in UNROLLED}
    pairwise: dict[str, Method] = {f"pairwise, {n}": Pairwise(released, n) for n in PAIRWISE}
    methods = {**streams, **runtimes, **unrolled, **opencv(), **pairwise}
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
        "ours": ours, "iterations": iterations, "methods": rows, "runtime": fastest,
        "copies": {name: count_copies(method, frames, device) for name, method in {**streams, **runtimes}.items()},
        "tensor_mib": memory, "process_peak_mb": peak_memory_mb(),
        "roofline": compare(works, peaks, rows[ours]["stage_ms"], iterations),
    }  # fmt: skip


def print_report(report: Row, console: Console) -> None:
    """Print the tables, and what one has to know to read them."""
    print_methods(report["methods"], report["ours"], console)
    print_stages(report, console)
    print_roofline(report["roofline"], report["ours"], console)
    console.print(
        f"{report['width']}x{report['height']}, {report['dtype']}, {torch.get_num_threads()} threads, "
        f"{report['runtime']}, {report['device']}; process at most {report['process_peak_mb']:.0f} MB"
    )
    if not report["methods"][report["ours"]]["rms_px"] <= NEAR_PX:
        console.print(f"no stream is within {NEAR_PX:g} px RMS of the reference: the nearest one is compared with")
    if not report["trained"]:
        console.print(f"no weights of {report['model']} ship, these are untrained: the distances mean nothing")
    for name, row in report["methods"].items():
        if row["resets"]:
            console.print(f"{name}: the stream began anew at {row['resets']} pairs, which do not count")


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure, print and draw."""
    keep_freed_memory()  # as the node does; all methods have the good of it
    report = measure(options, console)
    print_report(report, console)
    if options.timeline:
        draw_timeline(options.timeline, report["methods"][report["ours"]]["stage_ms"], report["iterations"])
    return report


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    line.add_argument("--input", help="bag, video or folder of images (default: a rendered drive)")
    line.add_argument("--size", default="nano", choices=sorted(SIZES), help="model size")
    line.add_argument("--model", help="weights, by path (default: those that ship with the size; untrained if none)")
    line.add_precision(PRECISIONS[1:], "--dtype")
    line.add_size(480, 640, "frames are resized to it")
    line.add_number("--iterations", [1, 2, 3, 4], "of streams", least=1, nargs="+")
    line.add_number("--frames", 40, "pairs to measure", least=1)
    line.add_number("--warm-up", 5, "pairs before, not measured", least=1)
    line.add_number("--every", 4, "all but streams get each so-many-th pair", least=1)
    line.add_path("--timeline", "draw when the work is done (.svg, .png)", metavar="OUT")
    options = line.parse_args(arguments)
    if options.timeline and options.timeline.suffix not in (".svg", ".png"):
        line.error(f"--timeline: expected a name that ends in .svg or .png, got {options.timeline}")
    return line.run(options, run)


if __name__ == "__main__":
    raise SystemExit(main())
