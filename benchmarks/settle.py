# SPDX-License-Identifier: Apache-2.0
"""Whether the flow settles: one and the same end from every start, however long the iteration goes on.

``python -m benchmarks.settle --pairs pairs.json [--sequence FRAMES ...] [--models nano base] [--plot OUT]``

A stable fixed point is what the method rests on (arXiv 2204.08442, sections 3 and 4). Every pair is iterated as the
stream does, z <- f(z), from five starts:

- *zero*: hidden state and flow zero.
- *coarse*: as a stream starts a pair without predecessor, from smaller versions of it.
- *warm*: the state of the pair before, moved along the motion, if the list or sequence has one. For a pair without,
  that of the same images in reverse order, its flow turned round and moved onto image 1; as far from what is sought as
  the state of a pair before whose motion was another.
- *random*: a random hidden state, tanh of standard normal noise, which is the range that it has; and a random motion,
  smooth, in each direction of ``--noise`` px RMS.
- *noise*: the same hidden state, and normal noise of ``--noise`` px in each direction, another in each cell. No flow
  looks like this; it is the hardest start that we know.

All distances are RMS over the pixels of the difference of two flows at full resolution, px. *Moved*: between the flow
after ``--early`` and after ``--iterations`` iterations. *Still*: the share of pixels whose flow moved by 0.05 px at
most between the two. *Update*: the RMS update at the last iteration. *To coarse*: between the end from this start and
that from *coarse*. *Apart*: the largest distance between any two of the ends, that from *noise* left out. *Error*: mean
endpoint error against the truth, mean over the groups of the list.

With ``--jacobian``, at the end from *coarse*: the spectral radius of the Jacobian of f, below 1 where the fixed point
is stable, and the relative residual of the adjoint equation, that of the implicit gradient, after 30 iterations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.report import write_json
from benchmarks.sequences import first_pairs, fitted, recorded
from benchmarks.settle_report import plot, print_tables, summarise
from benchmarks.warm_start import EncodedPair, coarse_start, encoded
from deq_flow_ros.equilibrium import State, implicit_gradient, solve, spectral_radius
from deq_flow_ros.model import FACTOR, DEQFlow, crop, load_model, update_px
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.streaming.warm_start import carry
from training.datasets import Sample
from training.pairs import pair_errors, to_array

STARTS = ("zero", "coarse", "warm", "random", "noise")
ERROR_MARKS = (6, 12, 24, 48, 96)
MARKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Iterations that the distance to the end is taken after, for the plot."""
STILL_PX = 0.05
"""Between ``--early`` and the end, of a pixel that has settled."""
PREDECESSOR_ITERATIONS = 24
"""Of the reversed pair, where there is none before."""
ADJOINT_ITERATIONS = 30
SMOOTH = 4
"""Knots, in each direction, of the random motion."""


def random_states(model: DEQFlow, pair: EncodedPair, noise_px: float, seed: int = 0) -> dict[str, State]:
    """The starts *random* and *noise*; the same numbers on every device."""
    hidden, flow = model.initial_state(pair.first)
    generator = torch.Generator().manual_seed(seed)
    noisy_hidden = torch.randn(hidden.shape, generator=generator).tanh().to(hidden)
    noise = torch.randn(flow.shape, generator=generator)
    smooth = F.interpolate(noise[..., :SMOOTH, :SMOOTH], flow.shape[-2:], mode="bicubic")
    smooth /= smooth.square().mean().sqrt()
    return {
        name: (noisy_hidden, (field * noise_px / FACTOR).to(flow))
        for name, field in (("random", smooth), ("noise", noise))
    }


def reversed_state(model: DEQFlow, sample: Sample) -> State:
    """A warm start out of the pair itself: the state from image 2 to image 1, turned round."""
    pair = encoded(model, replace(sample, image1=sample.image2, image2=sample.image1))
    start = coarse_start(model, pair)
    hidden, flow = carry(solve(pair.problem, start, max_iterations=PREDECESSOR_ITERATIONS).state)
    return hidden, -flow


def stability(model: DEQFlow, sample: Sample, state: State) -> dict[str, float]:
    """Of the Jacobian of the update at a state: its spectral radius, and how well the adjoint equation is solved.

    The latter is the relative residual after ``ADJOINT_ITERATIONS`` of Anderson's method, for the gradient of the mean
    squared flow.
    """
    with torch.inference_mode(False), torch.no_grad():
        pair = encoded(model, sample)
        state = (state[0].clone(), state[1].clone())
        radius = spectral_radius(pair.problem, state, generator=torch.Generator(model.device).manual_seed(0))
        residuals: list[float] = []
        with torch.enable_grad():
            attached = implicit_gradient(
                pair.problem,
                state,
                max_iterations=ADJOINT_ITERATIONS,
                report=lambda s: residuals.append(float(s.residual)),
            )
            model.upsample(attached).square().mean().backward()
    return {"spectral_radius": float(radius), "adjoint_residual": residuals[0]}


def rms(difference: Tensor) -> float:
    """Of the length of vectors, (1, 2, H, W)."""
    return float(difference.square().sum(1).mean().sqrt())


class Bench:
    """A model with what is measured of it."""

    def __init__(self, model: DEQFlow, iterations: int, early: int, noise_px: float, jacobian: bool = False) -> None:
        self.model, self.iterations, self.early, self.noise_px = model, iterations, early, noise_px
        self.jacobian = jacobian
        self.marks = sorted({n for n in (*MARKS, *ERROR_MARKS, early) if n < iterations} | {iterations})

    def run(self, samples: list[Sample]) -> Iterator[dict[str, Any]]:
        """A row per pair and start.

        :param samples: in the order of the list; where image 2 of one is image 1 of the next, the next starts from it.
        """
        last: tuple[Sample, State] | None = None
        for sample in samples:
            if last is not None and np.array_equal(last[0].image2, sample.image1):
                warm = carry(last[1])
            else:
                warm = reversed_state(self.model, sample)
            rows, settled = self.pair(sample, warm)
            yield from rows
            last = sample, settled

    def pair(self, sample: Sample, warm: State) -> tuple[list[dict[str, Any]], State]:
        """The rows of one pair, and the state that the stream would carry on."""
        pair = encoded(self.model, sample)
        starts = {
            "zero": self.model.initial_state(pair.first),
            "coarse": coarse_start(self.model, pair),
            "warm": warm,
            **random_states(self.model, pair, self.noise_px),
        }
        flows: dict[str, dict[int, Tensor]] = {}
        traces: dict[str, list[float]] = {}
        for name, start in starts.items():
            solution = solve(
                pair.problem, start, solver="picard", max_iterations=self.iterations, measure=update_px, keep=self.marks
            )
            traces[name] = solution.trace[:, 0].tolist()
            flows[name] = {n: crop(self.model.upsample(solution.trajectory[n]), pair.padding) for n in self.marks}
            if name == "coarse":
                settled = solution.state
        ends = {name: of_start[self.iterations] for name, of_start in flows.items()}
        apart = max(rms(ends[one] - ends[other]) for one, other in combinations(STARTS[:-1], 2))
        at_end = stability(self.model, sample, settled) if self.jacobian else {}
        rows = [
            {
                "case": "sequence" if sample.flow is None else "pairs",
                "pair": sample.name,
                "start": name,
                "moved_px": rms(ends[name] - flows[name][self.early]),
                "still": float(((ends[name] - flows[name][self.early]).norm(dim=1) <= STILL_PX).float().mean()),
                "update_px": traces[name],
                "distance_px": {n: rms(flows[name][n] - ends["coarse"]) for n in self.marks},
                "apart_px": apart,
                "epe_px": self.errors(sample, flows[name]),
                **(at_end if name == "coarse" else {}),
            }
            for name in STARTS
        ]
        return rows, settled

    def errors(self, sample: Sample, flows: dict[int, Tensor]) -> dict[int, float]:
        """Endpoint error, px, at the marks and at the end; nothing without a truth."""
        if sample.flow is None:
            return {}
        return {
            n: pair_errors(sample, to_array(flows[n]))[0] for n in sorted({*ERROR_MARKS, self.iterations}) if n in flows
        }


def read_samples(options: argparse.Namespace) -> list[Sample]:
    """The pairs of the list, ``--first`` of each group, then those of the sequences, made smaller to fit."""
    size = options.height, options.width
    samples = [fitted(pair, size) for pair in first_pairs(options.pairs, options.first)] if options.pairs else []
    for path in options.sequence:
        samples += recorded(path, options.frames, size).pairs
    return samples


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.settle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, help="list of pairs with truth, see training/pairs.py")
    parser.add_argument("--first", type=int, help="so many pairs of each group of the list (default: all)")
    parser.add_argument("--sequence", nargs="+", default=[], help="videos, bags or folders of images")
    parser.add_argument("--frames", type=int, default=4, help="frames of each --sequence (default 4)")
    parser.add_argument("--height", type=int, default=240, help="images are made smaller to fit (default 240)")
    parser.add_argument("--width", type=int, default=320, help="likewise (default 320)")
    parser.add_argument("--models", nargs="+", default=["nano", "base"], help="names or paths (default nano base)")
    parser.add_argument("--iterations", type=int, default=96, help="from each start (default 96)")
    parser.add_argument("--early", type=int, default=24, help="to compare the end with (default 24)")
    parser.add_argument("--noise", type=float, default=8.0, help="px, of the random start's flow (default 8)")
    parser.add_argument(
        "--jacobian", action="store_true", help="also its spectral radius and the adjoint equation, at coarse's end"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own)")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write the curves to this picture (.png, .svg)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file")
    options = parser.parse_args(arguments)
    if not 1 <= options.early < options.iterations:
        parser.error(f"expected 1 <= --early < --iterations, got {options.early} and {options.iterations}")
    if not (options.pairs or options.sequence):
        parser.error("expected --pairs or --sequence: without them there is nothing to measure")
    console = Console() if Console().is_terminal else Console(width=160)  # a file has room for the names
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    try:
        samples = read_samples(options)
        models = {Path(name).stem: load_model(name, options.device) for name in options.models}
        with torch.inference_mode(), console.status("") as status:
            for label, model in models.items():
                bench = Bench(model, options.iterations, options.early, options.noise, options.jacobian)
                for row in bench.run(samples):
                    rows.append({"model": label, **row})
                    status.update(f"{label}, {row['pair']}, {row['start']}")
    except (OSError, ValueError, RuntimeError, MediaError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    summary = summarise(rows)
    print_tables(summary, rows, options.early, console)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        figures = {
            "summary": summary, "curves": rows, "options": {name: str(value) for name, value in vars(options).items()},
        }  # fmt: skip
        write_json(options.json, next(iter(models.values())).device, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
