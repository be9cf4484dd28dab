# SPDX-License-Identifier: Apache-2.0
"""How long a field of a stream takes, beside other ways to it on the same images.

``python -m benchmarks.latency [--input RECORDING] [--model nano] [--device cpu] [--threads N] [--json OUT]``

*stream*: ``FlowEstimator``, warm, a fixed number of iterations. *pairwise*: the stateless way in which the method's
release works, with the same weights. *unrolled*: a RAFT-style recurrent network, cold, of the same parts at their
fastest. And OpenCV's DIS and Farneback. Each makes an array (H, W, 2) float32 of arrays (H, W, 3) uint8.

The methods take turns on each pair of images. *median*, *p95* and *p99* are the time from an image to its field in ms.
*wait* is that time divided by that of the stream with the most iterations, as the median over the pairs. *work* is the
same ratio, but counts what the stream does between a field and the next image as well (``FlowEstimator.prepare``), and
so does *fields/s*. *RMS* and *median px* are distances from the longest pairwise run: over all pixels; of a pair's
pixels, median of pairs.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import cv2
import numpy as np
import pandas as pd
import torch
from rich.console import Console

from benchmarks import peers
from benchmarks.memory import MIB, peak_bytes
from benchmarks.report import Benchmark, Row, copies_per_field, print_table, wall_s
from benchmarks.sequences import PERIOD_NS, moving_frames
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.evaluation.methods import FlowFunction
from deq_flow_ros.host import keep_freed_memory
from deq_flow_ros.model import PRECISIONS, DEQFlow, load_model
from deq_flow_ros.streaming import RUNTIMES, FlowEstimator, choose_runtime

PAIRWISE, UNROLLED = (24, 60), (12, 32)
WARM_UP, EVERY = 5, 4
"""Pairs that come before those that are measured; methods other than streams get every fourth of the measured ones."""
FIRST_SCENE_FRAME = 20
"""The frame of the rendered drive at which the camera moves at its usual speed."""
METHODS = {
    "method": "{method}", "pairs": "{pairs:.0f}", "median": "{median:.2f}", "p95": "{p95:.2f}", "p99": "{p99:.2f}",
    "fields/s": "{fields_per_second:.2f}", "work": "{work_by_ours:.2f}x", "wait": "{latency_by_ours:.2f}x",
    "RMS": "{rms_px:.3f}", "median px": "{median_px:.3f}",
}  # fmt: skip
STAGES = ("encode", "prepare", "match", "correlate", "iteration", "upsample", "output", "rest", "ahead")


class Streamed:
    """Our stream: ``FlowEstimator`` with a fixed number of iterations, which has to see every pair.

    :param runtime: the runtime that computes; it is ready before the first field.
    :ivar estimator: what computes.
    :ivar stage_ms: the times of the stages of the last field.
    """

    def __init__(self, model: DEQFlow, iterations: int, runtime: str = "auto") -> None:
        self.estimator = FlowEstimator(
            model, runtime=runtime, max_iterations=iterations, tolerance_px=None, residual=False
        )
        self.iterations, self.stage_ms, self._stamp_ns = iterations, dict[str, float](), 0

    def __call__(self, earlier: np.ndarray, later: np.ndarray) -> np.ndarray | None:
        """The flow of a pair; None if the stream began anew, and so has none, or one from a cold start."""
        if self.estimator.reset_reason == "start":
            size = earlier.shape[0], earlier.shape[1]
            self.estimator.engine.make_ready(size, size)
            self.estimator.update(earlier, self._stamp_ns)
            self.estimator.prepare()
        self._stamp_ns += PERIOD_NS
        result = self.estimator.update(later, self._stamp_ns)
        self.stage_ms = {} if result is None else result.info.stage_ms
        return result.flow if result is not None and result.info.warm else None

    def prepare(self) -> None:
        """Do the work that is possible before the next image arrives."""
        self.estimator.prepare()


Method = Streamed | FlowFunction


def load_frames(options: argparse.Namespace) -> list[np.ndarray]:
    """The frames asked for, (H, W, 3) uint8 RGB, in the size asked for; ``ValueError`` if there are fewer."""
    count, size = WARM_UP + options.frames + 1, (options.width, options.height)
    if options.input is None:
        scene = Scene(SceneSettings(*size))
        return [scene.render(FIRST_SCENE_FRAME + number) for number in range(count)]
    frames = moving_frames(options.input, count)
    if len(frames) < count:
        raise ValueError(
            f"{options.input}: expected {count} frames, for {WARM_UP} pairs to warm up and {options.frames} more, got "
            f"{len(frames)}; give a smaller --frames"
        )
    return [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]


def take_turns(
    methods: Mapping[str, Method], frames: Sequence[np.ndarray], warm_up: int, every: int, device: torch.device
) -> pd.DataFrame:
    """Let every method compute each pair of frames, (H, W, 3) uint8 RGB. Each time, another method begins.

    :param methods: by name. The last one is the reference for distances.
    :param warm_up: number of pairs at the beginning that do not count, at least 1.
    :param every: streams compute all pairs, other methods only every n-th.
    :returns: a row for each method and pair: whether there was a flow (none where a stream began anew), the times of
        the field and of all work in ms, of the stages as a dictionary, and, of pairs of which all methods have flow,
        the mean squared distance from the reference in px^2 and the median one in px.
    """
    rows, reference = [], list(methods)[-1]
    for pair, (earlier, later) in enumerate(pairwise(frames)):
        counted = pair - warm_up
        # The last turn that does not count is everyone's: the first use pays for allocations and kernel choices.
        for_all = counted == -1 or (counted >= 0 and counted % every == 0)
        turns = [name for name, method in methods.items() if for_all or isinstance(method, Streamed)]
        flows: dict[str, np.ndarray] = {}
        of_pair: list[Row] = []
        for name in turns[pair % len(turns) :] + turns[: pair % len(turns)]:
            method, began = methods[name], wall_s(device)
            flow = method(earlier, later)
            row: Row = {"method": name, "pair": pair, "flow": flow is not None, "stage_ms": {}}
            row |= {"latency_ms": 1e3 * (wall_s(device) - began), "square_px2": math.nan, "median_px": math.nan}
            if isinstance(method, Streamed):
                method.prepare()
                row["stage_ms"] = method.stage_ms
            of_pair.append({**row, "work_ms": 1e3 * (wall_s(device) - began)})
            flows |= {} if flow is None else {name: flow}
        if len(flows) == len(methods):  # distances of all are of the same pairs, not of one behind a cut
            for row in of_pair:
                squared = np.square(flows[row["method"]] - flows[reference]).sum(2)
                row["square_px2"], row["median_px"] = squared.mean(), np.sqrt(np.median(squared))
        rows += of_pair if counted >= 0 else []
    return pd.DataFrame(rows)


def summarise(samples: pd.DataFrame, methods: Mapping[str, Method], ours: str) -> dict[str, Row]:
    """The figures of each method. Those by "ours" are medians of the ratios to the time of this stream on each pair.

    :raises ValueError: if that has no field.
    """
    given = samples[samples.flow]
    if ours not in given.method.unique():
        raise ValueError("nothing can be compared: the stream started anew at each pair")
    latency, work = (given.pivot(index="pair", columns="method", values=name) for name in ("latency_ms", "work_ms"))
    by_method = given.groupby("method")
    made = {
        "pairs": by_method.size(), "resets": (~samples.flow).groupby(samples.method).sum(),
        "median": latency.median(), "p95": latency.quantile(0.95), "p99": latency.quantile(0.99),
        "fields_per_second": 1e3 / work.mean(), "work_by_ours": work.div(work[ours], axis=0).median(),
        "latency_by_ours": latency.div(latency[ours], axis=0).median(),
        "rms_px": by_method.square_px2.mean() ** 0.5, "median_px": by_method.median_px.median(),
    }  # fmt: skip
    figures = pd.DataFrame(made).to_dict("index")
    rows: dict[str, Row] = {name: figures[name] for name in methods if name in figures}
    for name, method in methods.items():
        if name in rows and isinstance(method, Streamed):
            rows[name]["stage_ms"] = stages(by_method.get_group(name), method.iterations)
    return rows


def stages(given: pd.DataFrame, iterations: int) -> dict[str, float]:
    """The median ms of each stage; of the solve, those of one iteration. "ahead" is the work for the next image."""
    known = pd.DataFrame(given.stage_ms.tolist(), index=given.index).fillna(0.0)
    rest, ahead = given.latency_ms - known.sum(axis=1), given.work_ms - given.latency_ms
    known = known.assign(iteration=known.solve / iterations, rest=rest, ahead=ahead).drop(columns="solve")
    return {str(name): float(ms) for name, ms in known.median().items()}


def tensor_mib(method: Method, frames: Sequence[np.ndarray], device: torch.device) -> float:
    """The largest amount of memory in MiB that tensors took during two fields, beyond what they took before."""

    def fields() -> None:
        for earlier, later in pairwise(frames[:3]):
            method(earlier, later)
            if isinstance(method, Streamed):
                method.prepare()

    return peak_bytes(fields, device) / MIB


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Measure everything and print it. Memory comes first, while there is nothing yet that a method could reuse."""
    keep_freed_memory()  # as the node does; all methods have the good of it
    model = load_model(options.model, options.device, precision=options.dtype)
    frames, device, dtype = load_frames(options), model.device, next(model.parameters()).dtype
    reference = peers.as_released(load_model(options.model, device, fold=False))
    released = reference if dtype == torch.float32 else copy.deepcopy(reference).to(dtype)
    most, fastest = max(options.iterations), choose_runtime("auto", device)[0]
    slower = [name for name in RUNTIMES if name != "auto"]
    streams = {f"stream, {n}": Streamed(model, n) for n in sorted(set(options.iterations))}
    streams |= {f"{name}, {most}": Streamed(model, most, name) for name in slower[: slower.index(fastest)]}
    methods: dict[str, Method] = {**streams, **{f"unrolled, {n}": peers.unrolled(model, n) for n in UNROLLED}}
    methods |= {**peers.OPENCV, **{f"pairwise, {n}": peers.pairwise(released, n) for n in PAIRWISE}}
    if dtype != torch.float32:
        methods[f"float32, {PAIRWISE[-1]}"] = peers.pairwise(reference, PAIRWISE[-1])
    with console.status("memory") as status:
        short: dict[str, Method] = {"stream": Streamed(model, 1), "unrolled": peers.unrolled(model, 1)}
        short["pairwise"] = peers.pairwise(released, 1)
        memory = {kind: tensor_mib(method, frames, device) for kind, method in short.items()}
        status.update("latency")
        samples = take_turns(methods, frames, WARM_UP, EVERY, device)
    ours = f"stream, {most}"
    rows = summarise(samples, methods, ours)
    title = f"latency of a field, ms; work and wait: by those of '{ours}'; distance, px"
    print_table(console, title, METHODS, ({"method": name, **row} for name, row in rows.items()))
    columns = {"stream": "{name}", **{name: f"{{{name}:.2f}}" for name in STAGES}, "copies per field": "{copies}"}
    copies = {name: copies_per_field(method.estimator, frames) for name, method in streams.items() if name in rows}
    of_streams = [{"name": name, "copies": words, **rows[name]["stage_ms"]} for name, words in copies.items()]
    print_table(console, "median ms by stage", columns, of_streams)
    taken = ", ".join(f"{kind} {mib:.0f} MiB" for kind, mib in memory.items())
    console.print(
        f"{options.width}x{options.height}, {options.dtype}, {torch.get_num_threads()} threads, {fastest}; the most "
        f"memory of tensors, besides weights: {taken}"
    )
    for name, row in rows.items():
        if row["resets"]:
            console.print(f"{name}: the stream began anew at {row['resets']} pairs, which do not count")
    return {"ours": ours, "methods": rows, "runtime": fastest, "copies": copies, "tensor_mib": memory}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    line.add_argument("--input", help="bag, video or folder of images (default: a rendered drive)")
    line.add_model()
    line.add_precision(PRECISIONS[1:], "--dtype")
    line.add_size(480, 640, "frames are resized to it")
    line.add_number("--iterations", [1, 2, 3, 4], "of streams", least=1, nargs="+")
    line.add_number("--frames", 40, "pairs to measure", least=1)
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
