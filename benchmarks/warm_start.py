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

*Update*: RMS of the flow update of an iteration, px, which is what a solve stops on. *Distance*: RMS over the cells of
their flow's distance from the settled state, px. The settled state is the one of least update that Anderson's method
finds in ``--reference`` iterations, from *coarse* and from *full, warped*; the nearer of the two counts. Their own
updates and how far they are apart are printed: below these, distances mean nothing. *Error*: mean endpoint error, px,
against the truth; where there is none, against the settled state found from *coarse*. *Stream*: a ``FlowEstimator``
that made no more iterations at any pair before either.

Generated sequences are slow, fast, and have a cut, behind which the first pair is solved: there, the states that are
reused come from a pair of unrelated images, and only *stream* has noticed. It must then be no worse than *coarse*: else
the exit status is 1. Times are processor time on a CPU and wall time on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from rich.console import Console

from benchmarks.report import Benchmark, Row, clock_s, watched
from benchmarks.sequences import PERIOD_NS, EncodedPair, ImageSequence, generated, listed, recorded
from benchmarks.warm_start_report import STREAM, cut_problems, plot, print_tables, summarise
from deq_flow_ros.equilibrium import State, solve
from deq_flow_ros.model import FACTOR, DEQFlow, load_model, update_px
from deq_flow_ros.streaming import FlowEstimator, FlowResult
from deq_flow_ros.streaming.warm_start import carry
from training.datasets import Sample
from training.pairs import pair_errors, to_array


def starts(pair: EncodedPair, last: State) -> dict[str, Callable[[], State]]:
    """The ways to start a pair, by name.

    :param last: the state of the previous pair.
    """
    return {
        "zero": pair.zero,
        "coarse": pair.coarse,
        "flow": lambda: (pair.zero()[0], last[1]),
        "flow, warped": lambda: (pair.zero()[0], carry(last)[1]),
        "full": lambda: last,
        "full, warped": lambda: carry(last),
    }


def distance_px(state: State, settled: State) -> float:
    """The RMS length of the difference in flow over the cells, in px of the full resolution."""
    return float(FACTOR * (state[1] - settled[1]).square().sum(1).mean().sqrt())


def motion_px(truth: Sample) -> float:
    """The mean length of the true flow."""
    assert truth.flow is not None
    return float(np.linalg.norm(truth.flow, axis=2)[truth.valid].mean())


class Bench:
    """A model, and the measurements that are made with it."""

    def __init__(self, model: DEQFlow, options: argparse.Namespace) -> None:
        self.model, self.iterations, self.marks = model, options.iterations, sorted(set(options.marks))
        self.reference, self.carried = options.reference, options.carried

    def sequence(self, sequence: ImageSequence) -> Iterator[Row]:
        """One row for each measured pair of a sequence and each start."""
        results = {mark: self.stream(sequence, mark) for mark in self.marks}
        last: State | None = None
        for place, sample in enumerate(sequence.pairs[: max(sequence.measured) + 1]):
            pair = EncodedPair(self.model, sample)
            if last is not None and place in sequence.measured:
                # It noticed the cut if it did not start warm across it, or behind it.
                pairs = results[self.marks[0]][place - 1 : place + 1]
                noticed = any(result is None or not result.info.warm for result in pairs)
                for row in self.pair(pair, last, {mark: of_pair[place] for mark, of_pair in results.items()}):
                    yield {"group": sequence.group, "pair": sample.name, "noticed": noticed, **row}
            start = pair.coarse() if last is None else carry(last)
            last = solve(pair.problem, start, max_iterations=self.carried, check_start=False).state

    def stream(self, sequence: ImageSequence, iterations: int) -> list[FlowResult | None]:
        """The results of an estimator that makes this number of iterations for each pair; None where it began a new
        stream.
        """
        estimator = FlowEstimator(self.model, max_iterations=iterations, tolerance_px=None)
        return [estimator.update(frame, n * PERIOD_NS) for n, frame in enumerate(sequence.frames)][1:]

    def pair(self, pair: EncodedPair, last: State, stream: dict[int, FlowResult | None]) -> Iterator[Row]:
        """Measure every start on one pair.

        :param last: the state of the previous pair.
        :param stream: the results of the estimator, by its number of iterations.
        """
        settled = [pair.settled(start, self.reference) for start in (pair.coarse(), carry(last))]
        states = [solution.state for solution in settled]
        truth = pair.sample
        if truth.flow is None:  # then it is the settled flow
            everywhere = np.ones(truth.image1.shape[:2], bool)
            truth = replace(truth, flow=to_array(pair.flow(states[0])), valid=everywhere)
        of_pair = {
            "truth": pair.sample.flow is not None,
            "motion_px": motion_px(truth),
            "settled": {
                "update_px": [float(solution.residual) for solution in settled],
                "apart_rms_px": distance_px(*states),
                "error_px": pair.error(states[0], truth),
            },
        }
        for name, make in starts(pair, last).items():
            yield {"start": name, **of_pair, **self.curves(pair, make, states, truth)}
        errors = {mark: pair_errors(truth, result.flow)[0] for mark, result in stream.items() if result is not None}
        yield {"start": STREAM, **of_pair, "error_px": errors}

    def curves(self, pair: EncodedPair, make: Callable[[], State], settled: list[State], truth: Sample) -> Row:
        """The measurements from one start at each iteration, from 0, which is the start itself (the updates: from
        1).
        """
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
        errors = [pair.error(state, truth) for state in way]
        return {
            "start_ms": 1e3 * (started - began),
            "iteration_ms": 1e3 * (ended - started) / solution.evaluations,
            "update_px": solution.trace[:, 0].tolist(),
            # To the nearer of the settled states, as a whole: cells of both together may be no state at all.
            "distance_rms_px": [min(distance_px(state, to) for to in settled) for state in way],
            "error_px": {mark: errors[mark] for mark in (0, *self.marks)},
            "errors_px": errors,
        }


def sequences(options: argparse.Namespace) -> Iterator[ImageSequence]:
    """All sequences that the options ask for."""
    size = options.height, options.width
    listed_ones = listed(options.pairs, size) if options.pairs else iter(())
    videos = (recorded(path, options.frames, size, options.skip) for path in options.sequence)
    made = generated(options.clips, options.clip_frames, size) if options.clips else iter(())
    return chain(listed_ones, videos, made)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Measure every start on every pair.

    :raises ValueError: if no pair has a predecessor.
    """
    model = load_model(options.model, options.device)
    bench = Bench(model, options)
    made = (row for sequence in sequences(options) for row in bench.sequence(sequence))
    with torch.inference_mode():
        rows = watched(made, console, "{pair}, {start}")
    if not rows:
        raise ValueError(f"{options.pairs} has no two pairs that follow each other")
    summary = summarise(rows, options.bound)
    print_tables(summary, options.bound, console)
    if options.plot:
        plot(rows, options.bound[0], options.plot)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "summary": summary, "problems": cut_problems(rows), "curves": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="the curves")
    line.add_pairs("list of pairs with true flow, see training/pairs.py, for its sequences")
    line.add_argument("--sequence", nargs="+", default=[], help="videos, bags or folders of images")
    line.add_number("--frames", 8, "frames of each --sequence", least=3)
    line.add_number("--skip", 0, "frames of each --sequence to pass over first", least=0)
    line.add_number("--clips", 3, "generated sequences of each kind; 0: none", least=0)
    line.add_number("--clip-frames", 6, "frames of each of them", least=3)
    line.add_size(240, 320, "frames are made smaller to fit")
    line.add_model()
    line.add_number("--iterations", 24, "evaluations from each start", least=1)
    line.add_number("--marks", [1, 2, 4, 8], "iterations to print at", least=1, nargs="+")
    line.add_number("--carried", 12, "iterations of the pair before", least=1)
    line.add_number("--reference", 96, "iterations to the settled state", least=1)
    line.add_number("--bound", [0.05], "px, to count to", above=0, nargs="+")
    options = line.parse_args(arguments)
    if max(options.marks) > options.iterations:
        line.error(f"--marks: expected numbers from 1 to --iterations, {options.iterations}, got {options.marks}")
    if not (options.pairs or options.sequence or options.clips):
        line.error("expected --pairs, --sequence or --clips above 0: without them there is nothing to measure")
    return line.run(options, measure)


if __name__ == "__main__":
    raise SystemExit(main())
