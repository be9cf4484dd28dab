# SPDX-License-Identifier: Apache-2.0
"""Memory and time of one training step: the equilibrium model and its recurrent counterpart.

``python -m benchmarks.memory [--size base] [--device cpu] [--json OUT]``

"Saved" are the bytes of the distinct storages that autograd holds for the backward pass, parameters not counted. "Peak"
is the most memory that tensors took at any time of the step beyond what was there before. "Recompute" rows run encoder
blocks and lookups again in the backward pass. Losses are those of the training, at full resolution. Times are processor
seconds on a CPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.report import Benchmark, Row, clock_s, print_table
from deq_flow_ros.model import SIZES, DEQFlow
from deq_flow_ros.model.weights import check_device
from training.flow_dataset import Clip
from training.objective import Objective

Result = TypeVar("Result")
MIB = 2**20


def objectives() -> dict[str, Objective]:
    """The losses to compare: the recurrent counterpart's, and the equilibrium model's with each gradient."""
    one = Objective(corrections=1, matching=0.0)
    return {
        "recurrent": replace(one, recurrent=True),
        "one-step": one,
        "one-step x 3": replace(one, corrections=3),
        "phantom-3": replace(one, gradient="phantom-3"),
        "implicit": replace(one, gradient="implicit"),
    }


def make_clip(height: int, width: int, device: torch.device) -> Clip:
    """A pair of noise images that differ by a shift of 3 px. How much is stored does not depend on the values."""
    image = np.random.default_rng(0).uniform(0, 255, (1, 3, height, width + 3)).astype(np.float32)
    images = torch.from_numpy(np.stack((image[..., 3:], image[..., :-3]), 1)).to(device)
    flow = torch.tensor([3.0, 0.0], device=device).view(1, 1, 2, 1, 1).expand(1, 1, 2, height, width)
    seen = torch.ones(1, 1, height, width, dtype=torch.bool, device=device)
    return Clip(images=images, flow=flow, occluded=~seen, valid=seen)


def saved_bytes(model: nn.Module, forward: Callable[[], Result]) -> tuple[Result, int]:
    """The return value of ``forward``, and the number of bytes that autograd holds for its backward pass."""
    permanent = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in permanent:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that saved itself, graph and all, would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return result, sum(sizes.values())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most memory that tensors took during ``step``, beyond what they took before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of itself on every use
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def measure(model: DEQFlow, clip: Clip, objective: Objective, counts: list[int], compare: int) -> Row:
    """The MiB saved for each number of iterations; the peak memory and the time of a whole step for one of them."""

    def forward(iterations: int) -> Tensor:
        exactly = replace(objective, cold_iterations=(iterations, iterations))
        return exactly.loss(model, clip, np.random.default_rng(0))[0]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward(compare).backward()

    saved = {count: saved_bytes(model, lambda count=count: forward(count))[1] / MIB for count in counts}  # type: ignore[misc]
    began = clock_s(model.device)
    step()
    seconds = clock_s(model.device) - began
    model.zero_grad(set_to_none=True)  # else the step frees the gradients of the one before it, and so hides some
    return {"saved_mib": saved, "peak_mib": peak_bytes(step, model.device) / MIB, "seconds": seconds}


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure every method, with and without recomputation."""
    device, counts = check_device(options.device), sorted({*options.iterations, options.compare})
    torch.manual_seed(0)
    model, clip = DEQFlow(options.size).to(device).train(), make_clip(options.height, options.width, device)
    measure(model, clip, Objective(), [3], 3)  # the first step pays for allocations and kernel choices
    results: dict[str, Row] = {}
    with console.status("") as status:
        for recompute in (False, True):
            for name, objective in objectives().items():
                label = f"{name}, recompute" if recompute else name
                status.update(label)
                objective = replace(objective, recompute=recompute)
                row = results[label] = measure(model, clip, objective, counts, options.compare)
                base = results["recurrent"]
                row["less_saved"] = base["saved_mib"][options.compare] / row["saved_mib"][options.compare]
                row |= {"less_at_peak": base["peak_mib"] / row["peak_mib"], "time": row["seconds"] / base["seconds"]}
    columns = {"method": "{method}", **{f"saved {count}": f"{{saved_mib[{count}]:.0f}}" for count in counts}}
    columns |= {"peak": "{peak_mib:.0f}", "s": "{seconds:.1f}", "less saved": "÷{less_saved:.1f}"}
    columns |= {"less at the peak": "÷{less_at_peak:.1f}", "time": "x{time:.2f}"}
    title = f"one training step, MiB and s at {options.compare} iterations; compared with the first"
    print_table(console, title, columns, ({"method": name, **row} for name, row in results.items()))
    return {"methods": results}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    line.add_argument("--size", default="base", choices=sorted(SIZES), help="model size (default base)")
    line.add_size(368, 496, "of the images", multiple=8)
    line.add_number("--iterations", [12, 36, 48], "at least 3, the steps of phantom-3", least=3, nargs="+")
    line.add_number("--compare", 36, "iterations that ratios are taken at", least=3)
    return line.run(line.parse_args(arguments), run)


if __name__ == "__main__":
    raise SystemExit(main())
