# SPDX-License-Identifier: Apache-2.0
"""Memory of inference by image size, with the correlation of all pairs and on demand.

``python -m benchmarks.inference_memory [--model nano] [--sizes 640x480 1920x1080] [--device cpu] [--json OUT]``

Each row is a process of its own: both images encoded, a few iterations, the flow at full resolution. "Process" is the
most memory that it ever held (VmHWM of /proc/self/status), PyTorch and weights included; "tensors" what came on top
after the model was loaded, on a GPU by PyTorch's allocator. "Volume" is what all pairs take by themselves: 4 bytes for
each cell of 8x8 px with each cell of every level.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.report import MIB, Benchmark, Row, table
from deq_flow_ros.model import FACTOR, load_model
from deq_flow_ros.model.weights import check_device


def process_peak() -> int:
    """The most memory that this process has ever held, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: expected a line VmHWM, got none; this benchmark needs Linux")


@torch.inference_mode()
def infer(name: str, device: str, height: int, width: int, iterations: int, all_pairs: bool) -> Row:
    """The peak memory of computing the flow of one pair, in bytes."""
    model = load_model(name, device)
    before = process_peak()
    image = torch.rand(1, 3, height, width, device=device)
    first, second = model.encode(255 * image), model.encode(255 * image.roll(3, -1))
    problem = model.problem(first, second, iterations=None if all_pairs else iterations)
    state = model.initial_state(first)
    for _ in range(iterations):
        state = problem(*state)
    assert model.upsample(state).isfinite().all()
    on_gpu = torch.device(device).type == "cuda"
    return {
        "correlation": type(problem.correlation).__name__,
        "process": process_peak(),
        "tensors": torch.cuda.max_memory_allocated(device) if on_gpu else process_peak() - before,
    }


def measure(*arguments: Any) -> Row:
    """Run ``infer`` in a new process, whose memory nothing else has enlarged."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(infer, *arguments).result()


def size(text: str) -> tuple[int, int]:
    """(height, width) from ``WIDTHxHEIGHT``, both rounded up to multiples of 8, as a model pads them."""
    try:
        width, height = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 640x480, got {text!r}") from None
    if min(width, height) < 64:
        raise argparse.ArgumentTypeError(f"expected at least 64x64, got {text}")
    return height + -height % FACTOR, width + -width % FACTOR


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure every size with both forms of the correlation, and print the table."""
    check_device(options.device)
    load_model(options.model)  # that there are such weights is to be said before the first process
    columns, rows = ("process", "tensors", "volume"), []
    peaks = table("peaks, MiB", ["size", "correlation"], columns)
    for height, width in options.sizes:
        cells = height * width // FACTOR**2
        for all_pairs in (True, False):
            row = measure(options.model, options.device, height, width, options.iterations, all_pairs)
            rows.append({"height": height, "width": width, "volume": 4 * cells * (cells * 4 // 3), **row})
            figures = (f"{rows[-1][column] / MIB:.0f}" for column in columns)
            peaks.add_row(f"{width}x{height}", "all pairs" if all_pairs else row["correlation"], *figures)
    console.print(peaks)
    return {"iterations": options.iterations, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    line.add_model()
    usual = [(480, 640), (720, 1280), (1080, 1920)]
    line.add_argument("--sizes", type=size, nargs="+", default=usual,
                      help="WIDTHxHEIGHT (default 640x480 1280x720 1920x1080)")  # fmt: skip
    line.add_number("--iterations", 4, "of the update operator", least=1)
    return line.run(line.parse_args(arguments), run)


if __name__ == "__main__":
    raise SystemExit(main())
