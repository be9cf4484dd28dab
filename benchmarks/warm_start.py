# SPDX-License-Identifier: Apache-2.0
"""What a start is worth: from nothing, and from what is known of the pair before.

``python -m benchmarks.warm_start [--pairs pairs.json] [--sequence FRAMES ...] [--clips 3] [--json OUT]``

Every pair of recorded and generated sequences that has one before it is solved from each start, which
docs/warm_start.md describes. The state that is reused is that of the pair before after 12 iterations, its flow alone or
in *full*, *warped* (moved along the motion) or not. The settled states are those of least update that Anderson's method
finds in ``--reference`` iterations, from *coarse* and from *full, warped*. *Error*: mean endpoint error, px, against
the truth; where there is none, against the settled state from *coarse*.

Generated sequences are slow, fast, and have a cut, behind which the first pair is solved: only *stream*, which is a
``FlowEstimator``, has noticed. It must then be no worse than *coarse*: else the exit status is 1. Times are processor
time on a CPU and wall time on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from benchmarks.report import Benchmark, Row, clock_s, grouped, print_table, watched
from benchmarks.sequences import CUTS, EncodedPair, ImageSequence, add_inputs, every_sequence, stream
from deq_flow_ros.equilibrium import State, solve
from deq_flow_ros.model import FACTOR, DEQFlow, load_model, update_px
from deq_flow_ros.model.cells import carry
from deq_flow_ros.streaming import FlowResult
from training.evaluate import pair_error
from training.flow_dataset import to_array

STREAM, COLD = "stream", ("zero", "coarse")
MARKS = (1, 2, 4, 8)
"""Iterations at which the error is printed; those that the streams make at every pair."""
CARRIED, CLIP_FRAMES = 12, 6  # iterations of the pair before; frames of a generated sequence
BOUND_PX, SETTLED_PX = 0.05, 0.02
"""The update that iterations are counted to; how far an error may exceed that of the settled state to count as it."""
PHASES = ((1, 2), (2, 4), (4, 8), (8, 16))
"""Ranges of iterations over which the mean factor of the update per iteration is reported."""
SLACK_PX = 0.01
"""Allowed between two solves of one pair whose images were encoded in different batches: rounding."""


def starts(pair: EncodedPair, last: State) -> dict[str, Callable[[], State]]:
    """The ways to start a pair, by name, from the state of the previous pair."""
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


def rows_of(model: DEQFlow, sequence: ImageSequence, options: argparse.Namespace) -> Iterator[Row]:
    """One row for each measured pair of a sequence and each start."""
    marks = [mark for mark in MARKS if mark <= options.iterations]
    results = {mark: stream(model, sequence.frames, max_iterations=mark)[1:] for mark in marks}
    last: State | None = None
    for place, sample in enumerate(sequence.pairs):
        pair = EncodedPair(model, sample)
        if last is not None and place >= sequence.first:
            # It noticed the cut if it did not start warm across it, or behind it.
            behind = results[MARKS[0]][place - 1 : place + 1]
            noticed = any(result is None or not result.info.warm for result in behind)
            of_pair = {mark: of_mark[place] for mark, of_mark in results.items()}
            for row in rows_of_pair(pair, last, of_pair, options):
                yield {"group": sequence.group, "pair": sample.name, "noticed": noticed, **row}
        start = pair.coarse() if last is None else carry(last)
        last = solve(pair.problem, start, max_iterations=CARRIED, check_start=False).state


def rows_of_pair(
    pair: EncodedPair, last: State, results: dict[int, FlowResult | None], options: argparse.Namespace
) -> Iterator[Row]:
    """Measure every start on one pair: at each iteration from 0, which is the start itself (the updates: from 1).

    :param last: the state of the previous pair.
    :param results: of the estimator, by its number of iterations.
    """
    reference: dict[str, Any] = {"solver": "anderson", "max_iterations": options.reference, "measure": update_px}
    settled = [solve(pair.problem, start, **reference) for start in (pair.coarse(), carry(last))]
    states, truth, device = [solution.state for solution in settled], pair.sample, last[1].device
    if truth.flow is None:  # then it is the settled flow
        everywhere = np.ones(truth.image1.shape[:2], bool)
        truth = replace(truth, flow=to_array(pair.flow(states[0])), valid=everywhere)
    settled_error, updates = pair.error(states[0], truth), [float(solution.residual) for solution in settled]
    of_pair = {"truth": pair.sample.flow is not None, "apart_px": distance_px(*states)}
    of_pair |= dict(zip(("coarse_px", "warped_px"), updates, strict=True))
    marks = range(1, options.iterations + 1)
    settings: dict[str, Any] = {"max_iterations": options.iterations, "measure": update_px, "check_start": False}
    for name, make in starts(pair, last).items():
        began = clock_s(device)
        start = make()
        started = clock_s(device)
        solution = solve(pair.problem, start, keep=marks, **settings)
        iteration_ms = 1e3 * (clock_s(device) - started) / solution.evaluations
        way, updates = [start, *solution.trajectory.values()], solution.trace[:, 0].tolist()
        errors = [pair.error(state, truth) for state in way]
        yield {
            "start": name, **of_pair, "update_px": updates,
            "error_px": {mark: errors[mark] for mark in (0, *MARKS) if mark <= options.iterations},
            **counted(updates, errors, settled_error, 1e3 * (started - began), iteration_ms),
        }  # fmt: skip
    of_stream = {mark: pair_error(truth, result.flow) for mark, result in results.items() if result is not None}
    yield {"start": STREAM, **of_pair, "error_px": of_stream}


def first_below(values: Sequence[float], bound: float) -> float:
    """The number of the first iteration (from 1) whose value is at or below the bound; infinite if there is none."""
    return next((float(n) for n, value in enumerate(values, 1) if value <= bound), float("inf"))


def counted(updates: list[float], errors: list[float], settled_px: float, start_ms: float, iteration_ms: float) -> Row:
    """Iterations to the bound of the update and to the settled error, infinite if never; the time to the latter, or to
    the end; the factor by which an iteration reduces the update, as the geometric mean within each of ``PHASES``.
    """
    to_error = first_below(errors, settled_px + SETTLED_PX) - 1
    return {
        "to_px": first_below(updates, BOUND_PX), "to_error": to_error, "first_update_px": updates[0],
        "to_error_ms": start_ms + min(to_error, len(updates)) * iteration_ms,
        "factors": [(updates[b - 1] / updates[a - 1]) ** (1 / (b - a)) for a, b in PHASES if b <= len(updates)],
    }  # fmt: skip


def summarise(rows: Sequence[Row]) -> list[Row]:
    """For each group and start, over the pairs: mean errors; median iterations to the bound; mean iterations and time
    to the settled error, where a pair that never has it counts as if with its last iteration; medians of the factors.
    """
    summary = []
    for group, of_group in grouped(rows, "group").items():
        by_start = {start: pd.DataFrame(some) for start, some in grouped(of_group, "start").items()}
        for start, some in by_start.items():
            entry: Row = {"group": group, "start": start, "pairs": len(some), "star": "" if some.truth[0] else " *"}
            entry["error_px"] = pd.DataFrame(list(some.error_px)).mean().to_dict()
            summary.append(entry)
            if start == STREAM:
                entry |= some[["coarse_px", "warped_px", "apart_px"]].median().to_dict()
                continue
            last = len(some.update_px[0])
            entry |= {
                "to_px": some.to_px.median(), "to_px_pairs": int(np.isfinite(some.to_px).sum()),
                "to_error": some.to_error.clip(upper=last).mean(),
                "to_error_pairs": int(np.isfinite(some.to_error).sum()),
                "ms_of_coarse": some.to_error_ms.mean() / by_start["coarse"].to_error_ms.mean(),
                "first_update_px": some.first_update_px.median(),
                "factors": np.median(list(some.factors), 0).tolist(),
            }  # fmt: skip
            for cold in COLD:
                # Of pairs in which either got there. A cold start that did not counts as if it had with its last
                # iteration: the true ratio is then at most this large.
                of_cold = by_start[cold].to_px
                known = np.isfinite(np.minimum(some.to_px, of_cold))
                entry[f"to_px_of_{cold}"] = (some.to_px / of_cold.clip(upper=last))[known].median()
    return summary


def cut_problems(rows: Sequence[Row]) -> list[str]:
    """Pairs behind a cut that the estimator solved worse than a cold start with as many iterations."""
    behind = [row for row in rows if row["group"] == CUTS]
    cold = {row["pair"]: row["error_px"] for row in behind if row["start"] == "coarse"}
    return [
        f"{row['pair']}, behind a cut ({'noticed' if row['noticed'] else 'not noticed'}): error {error:.2f} px after "
        f"{mark} iterations, {cold[row['pair']][mark]:.2f} px from a cold start"
        for row in behind
        if row["start"] == STREAM
        for mark, error in row["error_px"].items()
        if error > cold[row["pair"]][mark] + SLACK_PX
    ]


def print_tables(summary: Sequence[Row], console: Console) -> None:
    """Print errors, iterations to a small update and the settled error, factors, and how good settled states are."""
    names = {"sequence": "{group} ({pairs})", "start": "{start}"}
    columns = {**names, **{str(n): f"{{error_px[{n}]:.2f}}{{star}}" for n in summary[0]["error_px"]}}
    columns |= {f"to {BOUND_PX:g} px": "{to_px:g} ({to_px_pairs})"}
    columns |= {f"of {cold}": f"{{to_px_of_{cold}:.2f}}" for cold in COLD}
    title = "error, px, mean (*: from the settled state), and iterations to an update, median (pairs that got there)"
    print_table(console, title, columns, summary, names=2)
    columns = {**names, "iterations": "{to_error:.1f} ({to_error_pairs})", "ms of coarse": "{ms_of_coarse:.2f}"}
    columns |= {"first update, px": "{first_update_px:.2f}"}
    columns |= {f"{since} to {to}": f"{{factors[{place}]:.2f}}" for place, (since, to) in enumerate(PHASES)}
    title = f"iterations to the settled error, within {SETTLED_PX:g} px, mean (pairs that got there; others: the last),"
    title += " and what an iteration leaves of the update"
    print_table(console, title, columns, [row for row in summary if row["start"] != STREAM], names=2)
    columns = {"sequence": "{group}", "from coarse": "{coarse_px:.3f}", "from full, warped": "{warped_px:.3f}"}
    title = "update of the settled states, px, and how far apart they are, px RMS, median"
    of_streams = [row for row in summary if row["start"] == STREAM]
    print_table(console, title, {**columns, "apart": "{apart_px:.3f}"}, of_streams)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Measure every start on every pair; ``ValueError`` if no pair has a predecessor."""
    model = load_model(options.model, options.device)
    every = (row for part in every_sequence(options, CLIP_FRAMES) for row in rows_of(model, part, options))
    with torch.inference_mode():
        rows = watched(every, console, "{pair}, {start}")
    if not rows:
        raise ValueError(f"{options.pairs} has no two pairs that follow each other")
    summary = summarise(rows)
    print_tables(summary, console)
    return {"summary": summary, "problems": cut_problems(rows), "curves": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    add_inputs(line, frames=8)
    line.add_number("--clips", 3, "generated sequences of each kind; 0: none", least=0)
    line.add_model()
    line.add_number("--iterations", 24, "evaluations from each start", least=1)
    line.add_number("--reference", 96, "iterations to the settled state", least=1)
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
