# SPDX-License-Identifier: Apache-2.0
"""Memory and time of one training step: the equilibrium model and its recurrent counterpart, in one run.

``python -m benchmarks.memory [--size base] [--device cpu] [--plot OUT] [--json OUT]``

"Saved" are the bytes that autograd holds for the backward pass when the forward pass has ended: the distinct storages
behind all saved tensors, parameters not counted. "Peak" is the most memory that tensors took at any time of the step
beyond what was there before, what is computed again included: of PyTorch's allocator on a GPU, counted allocation by
allocation on a CPU. "Recompute" rows run encoder blocks and lookups again in the backward pass. Losses are those of the
training, at full resolution: at every step for the recurrent network, at one or three states for the equilibrium model.
Times are processor seconds on a CPU, whatever else it is doing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.report import write_json
from deq_flow_ros.model import SIZES, DEQFlow
from deq_flow_ros.model.weights import check_device
from training.objective import Objective
from training.rendering import Clip

MIB = 2**20
Result = TypeVar("Result")


def objectives() -> dict[str, Objective]:
    """The recurrent counterpart, and the gradients of the equilibrium model."""
    one = Objective(corrections=1, matching=0.0)
    return {
        "recurrent": replace(one, recurrent=True),
        "one-step": one,
        "one-step x 3": replace(one, corrections=3),
        "phantom-3": replace(one, gradient="phantom-3"),
        "implicit": replace(one, gradient="implicit"),
    }


def make_clip(height: int, width: int, batch: int, device: torch.device) -> Clip:
    """A pair of noise images, 3 px apart: what the values are does not change what is stored."""
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (batch, 3, height, width + 3)).astype(np.float32)
    images = torch.from_numpy(np.stack((image[..., 3:], image[..., :-3]), 1)).to(device)
    flow = torch.zeros(batch, 1, 2, height, width, device=device)
    flow[:, :, 0] = 3
    seen = torch.ones(batch, 1, height, width, dtype=torch.bool, device=device)
    return Clip(images=images, flow=flow, occluded=~seen, valid=seen)


def saved_bytes(model: nn.Module, forward: Callable[[], Result]) -> tuple[Result, int]:
    """What ``forward`` returns, and the bytes that autograd holds for its backward pass."""
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


def measure(
    model: DEQFlow, clip: Clip, objective: Objective, counts: list[int], compare: int, repeats: int
) -> dict[str, Any]:
    """Bytes saved for each number of iterations; peak and the median time of a whole step for one of them."""
    device = model.device

    def forward(iterations: int) -> Tensor:
        exactly = replace(objective, cold_iterations=(iterations, iterations))
        return exactly.loss(model, clip, np.random.default_rng(0))[0]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward(compare).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    saved = {}
    for count in counts:
        loss, saved[count] = saved_bytes(model, lambda count=count: forward(count))  # type: ignore[misc]
        del loss
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = []
    for _ in range(repeats):
        began = clock()
        step()
        seconds.append(clock() - began)
    model.zero_grad(set_to_none=True)  # else the step frees the gradients of the one before it, and so hides some
    return {
        "saved_mib": {count: size / MIB for count, size in saved.items()},
        "peak_mib": peak_bytes(step, device) / MIB,
        "seconds": statistics.median(seconds),
    }


def print_table(results: dict[str, dict[str, Any]], compare: int, console: Console) -> None:
    """One row per method; ratios to the first, the plain recurrent network."""
    base = next(iter(results.values()))
    table = Table(title=f"one training step, MiB and s at {compare} iterations; *: recompute; ÷, x: to the first")
    table.add_column("method", no_wrap=True)
    for count in base["saved_mib"]:
        table.add_column(f"saved {count}", justify="right")
    for column in ("peak", "s", "saved", "peak", "time"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        table.add_row(
            name.replace(", recompute", " *"),
            *(f"{size:.0f}" for size in row["saved_mib"].values()),
            f"{row['peak_mib']:.0f}",
            f"{row['seconds']:.1f}",
            f"÷{base['saved_mib'][compare] / row['saved_mib'][compare]:.1f}",
            f"÷{base['peak_mib'] / row['peak_mib']:.1f}",
            f"x{row['seconds'] / base['seconds']:.2f}",
        )
    console.print(table)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bytes saved against iterations."""
    colours = {"recurrent": "#c53030", "one-step": "#2b6cb0", "phantom-3": "#dd6b20", "implicit": "#2f855a"}
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, row in results.items():
            method, _, recompute = name.partition(", ")
            if method in colours:
                style = "--" if recompute else "-"
                counts, sizes = zip(*row["saved_mib"].items(), strict=True)
                axes.plot(counts, sizes, style, color=colours[method], marker=".", label=name)
        axes.set(xlabel="iterations", ylabel="saved for the backward pass, MiB", xticks=counts, ylim=(0, None))
        axes.grid(color="#e2e8f0")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="base", choices=sorted(SIZES), help="model size (default base)")
    parser.add_argument("--height", type=int, default=368, help="default 368, a multiple of 8")
    parser.add_argument("--width", type=int, default=496, help="default 496, a multiple of 8")
    parser.add_argument("--batch", type=int, default=1, help="default 1")
    parser.add_argument("--iterations", type=int, nargs="+", default=[12, 36, 48], help="default 12 36 48")
    parser.add_argument("--compare", type=int, default=36, help="iterations that ratios are taken at (default 36)")
    parser.add_argument("--repeats", type=int, default=1, help="timed steps per row, the median counts (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own)")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write saved bytes by iterations to this picture")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file")
    options = parser.parse_args(arguments)
    console = Console()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = check_device(options.device)
        for name in ("height", "width"):
            if getattr(options, name) < 64 or getattr(options, name) % 8:
                raise ValueError(f"--{name}: expected a multiple of 8 from 64 on, got {getattr(options, name)}")
        if min(*options.iterations, options.compare) < 3:
            raise ValueError("--iterations and --compare: expected at least 3, the steps of phantom-3")
        if options.repeats < 1 or options.batch < 1:
            raise ValueError(f"--repeats and --batch: expected at least 1, got {options.repeats}, {options.batch}")
    except (ValueError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    counts = sorted({*options.iterations, options.compare})
    torch.manual_seed(0)
    model = DEQFlow(options.size).to(device).train()
    clip = make_clip(options.height, options.width, options.batch, device)
    measure(model, clip, Objective(), [3], 3, 1)  # the first step pays for allocations and kernel choices
    results = {}
    with console.status("") as status:
        for recompute in (False, True):
            for name, objective in objectives().items():
                label = f"{name}, recompute" if recompute else name
                status.update(label)
                objective = replace(objective, recompute=recompute)
                results[label] = measure(model, clip, objective, counts, options.compare, options.repeats)
    print_table(results, options.compare, console)
    if options.plot:
        plot(results, options.plot)
    if options.json:
        figures = {
            "size": options.size, "height": options.height, "width": options.width, "batch": options.batch,
            "methods": results,
        }  # fmt: skip
        write_json(options.json, device, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
