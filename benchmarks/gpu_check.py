# SPDX-License-Identifier: Apache-2.0
"""Everything that a card is needed for: whether the GPU path does what it says, on this machine.

``make gpu-check``, or ``python -m benchmarks.gpu_check [--quick] [--json OUT]``; it needs no ROS.

Tests of the runtimes and on CUDA; the flow of all runtimes beside that of eager calls in float32; times of a field
through ``FlowEstimator.update``, copies included, by runtime, and of their stages by CUDA events; deadlines; memory
over many frames. One table, with what was wanted; the exit status is 1 if anything failed. Without a CUDA device what
needs none is done, and the rest is named as left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console

from benchmarks import peers
from benchmarks.report import Benchmark, Row, copies_per_field, print_table
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.host import peak_memory_mb
from deq_flow_ros.model import load_model
from deq_flow_ros.streaming import RUNTIMES, FlowEstimator, FlowInfo, choose_runtime

ROOT = Path(__file__).parents[1]
LOGIC = (
    "streaming/test_graphs", "streaming/test_graph_copies", "streaming/test_graph_capture", "streaming/test_runtime",
    "equilibrium/test_stopping",
)  # fmt: skip
ON_CUDA = ("streaming/test_graphs_cuda", "streaming/test_stream_batch", "equilibrium/test_solvers")
VGA, FULL_HD = (480, 640), (1080, 1920)
ITERATIONS, PERIOD_NS, FIRST_SCENE_FRAME = 4, 33_000_000, 20
PARITY_PX, HALF_PX = 1e-3, 0.02
WANTED = {("nano", VGA): (600, 1.6), ("base", VGA): (350, 2.8), ("nano", FULL_HD): (150, None)}
"""Fields a second at least, and ms of the median field at most, on an H100."""
SPREAD, SPEED_UP, FULL_HD_BYTES = 1.3, 10, 1.5e9
"""99th percentile by median; times as fast as 24 pairwise iterations; tensors at 1920x1080."""
DEADLINES_MS, KEPT_MS, KEPT = (2.0, 3.0, 5.0, 10.0), 3.0, 0.999
GROWTH_BYTES, GROWTH_MB = 1 << 20, 100
"""Of the device's and the process's memory over many frames."""


@dataclass(frozen=True)
class Check:
    """A line of the table; ``passed`` None: left out, or a figure of which nothing is wanted."""

    name: str
    figure: str
    wanted: str = ""
    passed: bool | None = None


def judged(name: str, value: float, text: str, limit: float | None, least: bool = False) -> Check:
    """A figure that must not be above a limit, or below if that is the ``least``; None: any is well."""
    if limit is None:
        return Check(name, text)
    passed = bool(value >= limit if least else value <= limit)  # of numpy's numbers too
    return Check(name, text, f"{'>=' if least else '<='} {limit:g}", passed)


def drive(size: tuple[int, int], count: int = 24) -> list[np.ndarray]:
    """Some frames of the rendered drive, forth and back: repeated, they are a stream that goes on for ever."""
    scene = Scene(SceneSettings(size[1], size[0]))
    frames = [scene.render(FIRST_SCENE_FRAME + number) for number in range(count)]
    return [*frames, *frames[-2:0:-1]]


on_card = lru_cache(load_model)  # so that checks share an engine, and the graphs that it has made


def make_estimator(name: str, size: tuple[int, int], precision: str, runtime: str, **settings: Any) -> FlowEstimator:
    """An estimator on the card whose graphs are ready, of exactly ``ITERATIONS`` unless the settings say otherwise."""
    model = on_card(name, "cuda", precision=precision)
    chosen: dict[str, Any] = {"max_iterations": ITERATIONS, "tolerance_px": None, **settings}
    estimator = FlowEstimator(model, runtime=runtime, **chosen)
    estimator.engine.make_ready(size, size)
    return estimator


def run(estimator: FlowEstimator, frames: list[np.ndarray], count: int) -> tuple[list[FlowInfo], np.ndarray]:
    """Accounts of so many fields behind some that do not count; ms (2, N) of each, without and with the work ahead."""
    infos, times_ms = [], []
    for number, image in enumerate(cycle(frames)):
        began = time.perf_counter()
        result = estimator.update(image, number * PERIOD_NS)
        done = time.perf_counter()
        estimator.prepare()
        torch.cuda.synchronize()
        if result is not None and number > 20:
            infos.append(result.info)
            times_ms.append((1e3 * (done - began), 1e3 * (time.perf_counter() - began)))
        if len(infos) == count:
            break
    return infos, np.array(times_ms).T


def check_tests(files: tuple[str, ...]) -> Check:
    """Tests, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"test/{file}.py" for file in files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    print("\n".join(lines[-80:]) if done.returncode else "", done.stderr[-2000:])
    summary = next((line for line in reversed(lines) if "passed" in line or "failed" in line or "error" in line), "")
    name = f"tests: {', '.join(Path(file).name for file in files)}"
    return Check(name, summary or f"exit status {done.returncode}", "all pass", done.returncode == 0)


def check_parity(runtimes: list[str]) -> Iterator[Check]:
    """The flow of each runtime beside that of eager calls, and of half precision beside float32."""
    images = drive(VGA, 8)

    def flows(precision: str, runtime: str) -> list[np.ndarray]:
        estimator, found = make_estimator("nano", VGA, precision, runtime), []
        for number, image in enumerate(images[:8]):
            result = estimator.update(image, number * PERIOD_NS)
            estimator.prepare()
            found += [] if result is None else [result.flow.copy()]
        return found

    expected = flows("float32", "eager")
    for runtime in runtimes[1:]:
        got = flows("float32", runtime)
        worst = max(float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True))
        yield judged(f"{runtime}: float32 flow, largest distance", worst, f"{worst:.2g} px", PARITY_PX)
    for runtime in runtimes:
        got = flows("float16", runtime)
        mean = float(np.mean([np.linalg.norm(a - b, axis=2).mean() for a, b in zip(got, expected, strict=True)]))
        yield judged(f"{runtime}: float16 flow, mean distance", mean, f"{mean:.4f} px", HALF_PX)


def check_times(
    name: str, size: tuple[int, int], runtimes: list[str], count: int, stages: list[Row]
) -> Iterator[Check]:
    """Times of a field by runtime; what is wanted is wanted of the fastest."""
    frames, (least, longest) = drive(size), WANTED[name, size]
    where = f"{name} {size[1]}x{size[0]}"
    pairwise_ms = time_pairwise(name, frames) if size == VGA else None
    for runtime in runtimes:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        estimator = make_estimator(name, size, "float16", runtime)
        ready_s = time.perf_counter() - began
        infos, (latency_ms, work_ms) = run(estimator, frames, count)
        peak = torch.cuda.max_memory_allocated() - before
        best = runtime == runtimes[-1]
        rate, median, p99 = 1e3 / np.mean(work_ms), float(np.median(latency_ms)), float(np.percentile(latency_ms, 99))
        of, spread = f"{where}, {runtime}", p99 / median
        yield judged(f"{of}: fields/s", rate, f"{rate:.0f}", least if best else None, least=True)
        yield judged(f"{of}: median, ms", median, f"{median:.2f}", longest if best else None)
        yield judged(f"{of}: 99 % by median", spread, f"{spread:.2f}", SPREAD if best else None)
        limit = FULL_HD_BYTES if size == FULL_HD and best else None
        yield judged(f"{of}: tensors, bytes", peak, f"{peak:.3g}", limit)
        if best and pairwise_ms:
            times = pairwise_ms / float(np.mean(work_ms))
            yield judged(f"{of}: by 24 pairwise iterations", times, f"{times:.1f}x", SPEED_UP, least=True)
        yield Check(f"{of}: made ready in", f"{ready_s:.1f} s")
        names = dict.fromkeys(stage for info in infos for stage in info.stage_ms)
        by_stage = {stage: float(np.median([info.stage_ms.get(stage, 0.0) for info in infos])) for stage in names}
        stages.append({"of": of, "stage_ms": by_stage, "copies": copies_per_field(estimator, frames)})
        estimator.engine.close()


def time_pairwise(name: str, frames: list[np.ndarray]) -> float:
    """Ms of a field of the stateless way with 24 iterations, in half precision."""
    model = peers.as_released(load_model(name, "cuda", fold=False)).half()
    method, times = peers.pairwise(model, 24), []
    for pair in pairwise(frames[:9]):
        began = time.perf_counter()
        method(*pair)  # the flow is an array of the host: it is there
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[2:]))


def check_deadlines(runtime: str, count: int) -> Iterator[Check]:
    """Share of frames that keep their budget at the full scale."""
    frames = drive(VGA)
    for budget_ms in DEADLINES_MS:
        settings = {"latency_budget_ms": budget_ms, "max_iterations": 60, "min_scale": 1.0}
        estimator = make_estimator("nano", VGA, "float16", runtime, **settings)
        estimator.warm_up(*VGA)
        infos, _ = run(estimator, frames, count)
        kept = float(np.mean([not info.over_budget for info in infos]))
        text = f"{100 * kept:.2f} %, {np.mean([info.iterations for info in infos]):.1f} iterations"
        limit = KEPT if budget_ms >= KEPT_MS else None
        yield judged(f"deadline of {budget_ms:g} ms kept", kept, text, limit, least=True)


def check_memory(runtime: str, count: int) -> Iterator[Check]:
    """Memory of the device and the process over many frames."""
    estimator, frames = make_estimator("nano", VGA, "float16", runtime), drive(VGA)
    run(estimator, frames, 200)
    estimator.reset("measuring")
    before, process = torch.cuda.memory_allocated(), peak_memory_mb()
    run(estimator, frames, count)
    grown, mb = torch.cuda.memory_allocated() - before, peak_memory_mb() - process
    yield judged(f"device memory over {count} frames, bytes", grown, f"{grown:+d}", GROWTH_BYTES)
    yield judged(f"process memory over {count} frames, MB", mb, f"{mb:+.0f}", GROWTH_MB)


def all_checks(options: argparse.Namespace, stages: list[Row]) -> Iterator[Check]:
    """One after the other."""
    yield check_tests(LOGIC)
    if not torch.cuda.is_available():
        yield Check("CUDA tests, parity, times, deadlines, memory", "left out: PyTorch sees no CUDA device here")
        return
    fastest, why = choose_runtime("auto", "cuda")
    runtimes = [name for name in RUNTIMES if name != "auto"]
    runtimes = runtimes[: runtimes.index(fastest) + 1]
    yield Check("runtime", f"{fastest}{'; ' + why if why else ''}", "compiled", fastest == "compiled")
    yield check_tests(ON_CUDA)
    fields, frames = (100, 500) if options.quick else (1000, 10_000)
    parts = [check_times(name, size, runtimes, fields, stages) for name, size in WANTED]
    for part in (*parts, check_parity(runtimes), check_deadlines(fastest, 2 * fields), check_memory(fastest, frames)):
        yield from guarded(part)


def guarded(part: Iterator[Check]) -> Iterator[Check]:
    """Checks, of which an error is one that failed: the other parts are still worth their time."""
    try:
        yield from part
    except Exception as error:
        traceback.print_exc()
        yield Check(type(error).__name__, (str(error).splitlines() or [""])[0], "none", False)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Check everything and print the table."""
    cv2.setNumThreads(1)
    stages: list[Row] = []
    checks = []
    for check in all_checks(options, stages):
        checks.append(check)
        console.print(f"{check.name}: {check.figure}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    if stages:
        names = dict.fromkeys(name for row in stages for name in row["stage_ms"])
        columns = {"of": "{of}", **{name: f"{{stage_ms[{name}]:.3f}}" for name in names}, "copies": "{copies}"}
        print_table(console, "median ms by stage, by CUDA events; copies per field", columns, stages)
    words = {True: "pass", False: "FAIL", None: "-"}
    columns = {"check": "{name}", "figure": "{figure}", "wanted": "{wanted}", "": "{word}"}
    rows = [{**asdict(check), "word": words[check.passed]} for check in checks]
    print_table(console, f"GPU check: {device}, PyTorch {torch.__version__}", columns, rows)
    failed = [f"{check.name}: {check.figure}" for check in checks if check.passed is False]
    return {"device_name": device, "checks": [asdict(check) for check in checks], "stages": stages, "problems": failed}


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False)
    line.add_argument("--quick", action="store_true", help="fewer frames: a tenth of the fields, 500 for the memory")
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
