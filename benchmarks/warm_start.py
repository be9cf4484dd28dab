# SPDX-License-Identifier: Apache-2.0
"""What a start is worth: from nothing, and from what is known of the pair before, on recorded and generated sequences.

``python -m benchmarks.warm_start [--pairs pairs.json] [--sequence FRAMES ...] [--clips 3] [--plot OUT] [--json OUT]``

Every pair that has one before it is solved from each start; the state that is reused is that of the pair before after
``--carried`` iterations, as the estimator leaves it:

- *zero*: hidden state and flow zero.
- *coarse*: as the estimator starts a pair without predecessor, from smaller versions of it.
- *flow*: the flow of the pair before, the hidden state zero; *flow, warped*: moved along the motion.
- *full*: hidden state and flow of the pair before, as they were.
- *full, warped*: both, moved along the motion; this is what the estimator does.

*Update*: RMS of the flow update of an iteration, px, which is what a solve stops on. *Distance*: of the cells' flow
from the settled state, px, as RMS, as median, and as share of the cells that are farther from it than the first
``--bound``. The settled state is the one of least update that Anderson's method finds in ``--reference`` iterations,
from *coarse* and from *full, warped*; the nearer of the two counts. Their own updates and how far they are apart are
printed: below these, distances mean nothing. *Error*: mean endpoint error, px, against the truth; where there is none,
against the settled state found from *coarse*. *Stream*: a `FlowEstimator` that made no more iterations at any pair
before either.

Generated sequences are slow, fast, and have a cut, behind which the first pair is solved: there, the states that are
reused come from a pair of unrelated images, and only *stream* has noticed. It must then be no worse than *coarse*: else
the exit status is 1. Times are processor time on a CPU and wall time on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.report import clock_s, write_json
from benchmarks.sequences import ImageSequence, generated, listed, recorded
from benchmarks.warm_start_report import cut_problems, plot, print_tables, summarise
from deq_flow_ros.equilibrium import State, solve
from deq_flow_ros.model import (
    FACTOR,
    DEQFlow,
    Encoding,
    FlowProblem,
    crop,
    load_model,
    pad_to_multiple,
    update_px,
    usable_levels,
)
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.streaming import FlowEstimator, FlowResult
from deq_flow_ros.streaming.eager import COARSE_ITERATIONS, COARSE_LEVELS
from deq_flow_ros.streaming.warm_start import carry
from training.datasets import Sample
from training.pairs import pair_errors, to_array, to_tensor

PERIOD_NS = 33_333_333
STREAM = "stream"


@dataclass(frozen=True)
class EncodedPair:
    """A pair of images, encoded: its problem, and what its starts need."""

    sample: Sample
    images: tuple[Tensor, Tensor]
    first: Encoding
    problem: FlowProblem
    padding: tuple[int, int, int, int]


def encoded(model: DEQFlow, sample: Sample) -> EncodedPair:
    """A pair, ready to be solved."""
    (image1, padding), (image2, _) = (
        pad_to_multiple(to_tensor(image, model.device).float()) for image in (sample.image1, sample.image2)
    )
    first = model.encode(image1)
    return EncodedPair(sample, (image1, image2), first, model.problem(first, model.encode(image2)), padding)


def coarse_start(model: DEQFlow, pair: EncodedPair) -> State:
    """As the estimator starts a pair without predecessor."""
    levels = min(COARSE_LEVELS, usable_levels(*pair.images[0].shape[-2:]))
    return model.coarse_start(*pair.images, levels, COARSE_ITERATIONS) or model.initial_state(pair.first)


def starts(model: DEQFlow, pair: EncodedPair, last: State) -> dict[str, Callable[[], State]]:
    """The ways to start a pair, by name.

    :param last: the state of the pair before.
    """
    return {
        "zero": lambda: model.initial_state(pair.first),
        "coarse": lambda: coarse_start(model, pair),
        "flow": lambda: (model.initial_state(pair.first)[0], last[1]),
        "flow, warped": lambda: (model.initial_state(pair.first)[0], carry(last)[1]),
        "full": lambda: last,
        "full, warped": lambda: carry(last),
    }


def cell_distances(state: State, settled: State) -> Tensor:
    """Length of the difference in flow of each cell, px of the full resolution."""
    return FACTOR * (state[1] - settled[1]).norm(dim=1).flatten()


def settle(pair: EncodedPair, start: State, iterations: int) -> tuple[State, float]:
    """The state of least update on Anderson's way from a start, and that update, RMS px."""
    solution = solve(pair.problem, start, solver="anderson", max_iterations=iterations, measure=update_px)
    return solution.state, float(solution.residual)


class Bench:
    """A model with what is measured of it."""

    def __init__(
        self, model: DEQFlow, iterations: int, marks: list[int], reference: int, carried: int, bound: float
    ) -> None:
        self.model, self.iterations, self.marks = model, iterations, marks
        self.reference, self.carried, self.bound = reference, carried, bound

    def sequence(self, sequence: ImageSequence) -> Iterator[dict[str, Any]]:
        """Every start on every measured pair of a sequence, one row each."""
        results = {mark: self.stream(sequence, mark) for mark in self.marks}
        last: State | None = None
        for place, sample in enumerate(sequence.pairs[: max(sequence.measured) + 1]):
            pair = encoded(self.model, sample)
            if last is not None and place in sequence.measured:
                # It noticed the cut if it did not start warm across it, or behind it.
                pairs = results[self.marks[0]][place - 1 : place + 1]
                noticed = any(result is None or not result.info.warm for result in pairs)
                for row in self.pair(pair, last, {mark: of_pair[place] for mark, of_pair in results.items()}):
                    yield {"group": sequence.group, "pair": sample.name, "noticed": noticed, **row}
            start = coarse_start(self.model, pair) if last is None else carry(last)
            last = solve(pair.problem, start, max_iterations=self.carried, check_start=False).state

    def pair(self, pair: EncodedPair, last: State, stream: dict[int, FlowResult | None]) -> Iterator[dict[str, Any]]:
        """Every start on one pair.

        :param last: the state of the pair before.
        :param stream: what the estimator gave, by its iterations.
        """
        settled = [settle(pair, start, self.reference) for start in (coarse_start(self.model, pair), carry(last))]
        states, updates = [state for state, _ in settled], [update for _, update in settled]
        apart = cell_distances(*states)
        truth = pair.sample if pair.sample.flow is not None else self._as_truth(pair, states[0])
        of_pair = {
            "truth": pair.sample.flow is not None,
            "motion_px": float(np.linalg.norm(truth.flow, axis=2)[truth.valid].mean()),  # type: ignore[arg-type]
            "settled": {
                "update_px": updates, "apart_rms_px": float(apart.square().mean().sqrt()),
                "apart_median_px": float(apart.median()), "error_px": self._error(pair, truth, states[0]),
            },
        }  # fmt: skip
        for name, make in starts(self.model, pair, last).items():
            yield {"start": name, **of_pair, **self._curves(pair, make, states, truth)}
        errors = {mark: pair_errors(truth, result.flow)[0] for mark, result in stream.items() if result is not None}
        yield {"start": STREAM, **of_pair, "error_px": errors}

    def stream(self, sequence: ImageSequence, iterations: int) -> list[FlowResult | None]:
        """Each pair by an estimator that makes so many iterations; None where it saw a new stream begin."""
        estimator = FlowEstimator(self.model, max_iterations=iterations, tolerance_px=None)
        return [estimator.update(frame, n * PERIOD_NS) for n, frame in enumerate(sequence.frames)][1:]

    def _curves(
        self, pair: EncodedPair, make: Callable[[], State], settled: list[State], truth: Sample
    ) -> dict[str, Any]:
        """From one start: what is measured at each iteration, from 0, the start itself, on (updates: from 1)."""
        device = self.model.device
        began = clock_s(device)
        start = make()
        started = clock_s(device)
        solution = solve(
            pair.problem, start, max_iterations=self.iterations, measure=update_px,
            keep=range(1, self.iterations + 1), check_start=False,
        )  # fmt: skip
        ended = clock_s(device)
        way = [start, *solution.trajectory.values()]
        # The nearer of the settled states, as a whole: cells of both together may be no state at all.
        near = [min((cell_distances(s, to) for to in settled), key=lambda d: float(d.square().mean())) for s in way]
        return {
            "start_ms": 1e3 * (started - began),
            "iteration_ms": 1e3 * (ended - started) / solution.evaluations,
            "update_px": solution.trace[:, 0].tolist(),
            "distance_rms_px": [float(d.square().mean().sqrt()) for d in near],
            "distance_median_px": [float(d.median()) for d in near],
            "share_beyond": [float((d > self.bound).float().mean()) for d in near],
            "error_px": {mark: self._error(pair, truth, way[mark]) for mark in (0, *self.marks)},
        }

    def _error(self, pair: EncodedPair, truth: Sample, state: State) -> float:
        return pair_errors(truth, self._flow(pair, state))[0]

    def _flow(self, pair: EncodedPair, state: State) -> np.ndarray:
        return to_array(crop(self.model.upsample(state), pair.padding))

    def _as_truth(self, pair: EncodedPair, state: State) -> Sample:
        """The pair with the flow of a state as its truth."""
        sample = pair.sample
        valid = np.ones(sample.image1.shape[:2], bool)
        return Sample(sample.name, sample.image1, sample.image2, self._flow(pair, state), valid, None)


def sequences(options: argparse.Namespace) -> Iterator[ImageSequence]:
    """All that the options ask for."""
    size = options.height, options.width
    listed_ones = listed(options.pairs, size) if options.pairs else iter(())
    videos = (recorded(path, options.frames, size, options.skip) for path in options.sequence)
    made = generated(options.clips, options.clip_frames, size) if options.clips else iter(())
    return chain(listed_ones, videos, made)


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse settings that make no sense."""
    for name, least in (
        ("height", 64), ("width", 64), ("frames", 3), ("skip", 0), ("clips", 0), ("clip_frames", 3), ("iterations", 1),
        ("reference", 1), ("carried", 1),
    ):  # fmt: skip
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(options, name)}")
    if min(options.marks) < 1 or max(options.marks) > options.iterations:
        parser.error(f"--marks: expected numbers from 1 to --iterations, {options.iterations}, got {options.marks}")
    if not min(options.bound) > 0:
        parser.error(f"--bound: expected numbers above 0, got {options.bound}")
    if not (options.pairs or options.sequence or options.clips):
        parser.error("expected --pairs, --sequence or --clips above 0: without them there is nothing to measure")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.warm_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=Path, help="list of pairs with truth, see training/pairs.py, for its sequences")
    parser.add_argument("--sequence", nargs="+", default=[], help="videos, bags or folders of images")
    parser.add_argument("--frames", type=int, default=8, help="frames of each --sequence (default 8)")
    parser.add_argument("--skip", type=int, default=0, help="frames of each --sequence to pass over first (default 0)")
    parser.add_argument("--clips", type=int, default=3, help="generated sequences of each kind (default 3; 0: none)")
    parser.add_argument("--clip-frames", type=int, default=6, help="frames of each of them (default 6)")
    parser.add_argument("--height", type=int, default=240, help="frames are made smaller to fit (default 240)")
    parser.add_argument("--width", type=int, default=320, help="likewise (default 320)")
    parser.add_argument("--model", default="nano", help="name or path of weights (default nano)")
    parser.add_argument("--iterations", type=int, default=24, help="evaluations from each start (default 24)")
    parser.add_argument("--marks", type=int, nargs="+", default=[1, 2, 4, 8], help="to print at (default 1 2 4 8)")
    parser.add_argument("--carried", type=int, default=12, help="iterations of the pair before (default 12)")
    parser.add_argument("--reference", type=int, default=96, help="iterations to the settled state (default 96)")
    parser.add_argument("--bound", type=float, nargs="+", default=[0.05], help="px, to count to (default 0.05)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own)")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write the curves to this picture (.png, .svg)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file")
    options = parser.parse_args(arguments)
    check(options, parser)
    console = Console() if Console().is_terminal else Console(width=150)  # a file has room for the names
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    try:
        model = load_model(options.model, options.device)
        bench = Bench(
            model, options.iterations, sorted(set(options.marks)), options.reference, options.carried, options.bound[0]
        )
        with torch.inference_mode(), console.status("") as status:
            for sequence in sequences(options):
                for row in bench.sequence(sequence):
                    rows.append(row)
                    status.update(f"{row['pair']}, {row['start']}")
    except (OSError, ValueError, RuntimeError, MediaError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    if not rows:
        console.print(f"error: {options.pairs} has no two pairs that follow each other", style="red", markup=False)
        return 2
    summary = summarise(rows, options.bound)
    problems = cut_problems(rows)
    print_tables(summary, problems, options.bound, console)
    if options.plot:
        plot(rows, options.bound[0], options.plot)
    if options.json:
        figures = {
            "model": options.model, "parameters": sum(p.numel() for p in model.parameters()), "summary": summary,
            "problems": problems, "curves": rows,
            "options": {name: str(value) for name, value in vars(options).items()},
        }  # fmt: skip
        write_json(options.json, model.device, figures)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
