# SPDX-License-Identifier: Apache-2.0
"""Running a model over a data set: cold, or along sequences with the fixed point of one pair as start of the next.

The work can be shared by processes (``torchrun``). Each measures whole sequences of its own; what is gathered are the
tallies of every pair, put back into the order of the data set, so the figures do not depend on the number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from deq_flow_ros.equilibrium import State
from deq_flow_ros.model import DEQFlow, Prediction
from deq_flow_ros.streaming.warm_start import carry
from training.datasets import FlowDataset, Sample
from training.distributed import Processes
from training.metrics import Tally, by_region, measure
from training.pairs import to_array, to_tensor

READ_AHEAD = 2


@dataclass(frozen=True)
class SolveSetting:
    """One way to solve a pair.

    :ivar iterations: evaluations of the update operator at most, the smaller resolutions of a cold start included.
    :ivar warm: start from the last pair's fixed point, moved along the motion; the first pair of a sequence has none.
    :ivar tolerance_px: stop when the RMS update of the flow is at or below this; None never stops early.
    """

    iterations: int
    warm: bool = False
    tolerance_px: float | None = None

    def __str__(self) -> str:
        count = str(self.iterations) if self.tolerance_px is None else f"to {self.tolerance_px:g} px"
        return f"{count} {'warm' if self.warm else 'cold'}"


@dataclass(frozen=True)
class Outcome:
    """What one setting gave on one pair: iterations at full resolution, and the tallies by region."""

    iterations: int
    regions: dict[str, Tally]


@dataclass(frozen=True)
class Record:
    """One pair: its place in the data set, whether the pair before it was solved as well, an outcome per setting."""

    index: int
    name: str
    follows: bool
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Solved:
    """A pair, its place in the data set, whether the pair before it was solved as well, a prediction per setting."""

    index: int
    follows: bool
    sample: Sample
    predictions: list[Prediction]


class Evaluator:
    """A model with what stays the same for all pairs.

    :param settings: what to compare; not empty.
    :param coarse_levels: smaller resolutions that a cold start begins with, see ``DEQFlow.coarse_start``.
    :param solver: by name.
    """

    def __init__(
        self, model: DEQFlow, settings: Sequence[SolveSetting], coarse_levels: int = 0, solver: str = "picard"
    ) -> None:
        if not settings:
            raise ValueError("expected at least one setting to evaluate")
        self.model, self.settings = model, tuple(settings)
        self.coarse_levels, self.solver = coarse_levels, solver
        # A stream begins once: the pair without predecessor is solved as well as any.
        self._first = max(setting.iterations for setting in settings)

    def solve(self, sample: Sample, setting: SolveSetting, last: State | None = None) -> Prediction:
        """One pair. A warm setting begins with ``last``, the state of the pair before; without one it begins cold."""
        state = carry(last) if setting.warm and last is not None else None
        return self.model(
            to_tensor(sample.image1, self.model.device),
            to_tensor(sample.image2, self.model.device),
            max_iterations=self._first if setting.warm and state is None else setting.iterations,
            solver=self.solver,
            tolerance_px=setting.tolerance_px,
            state=state,
            coarse_levels=self.coarse_levels,
        )

    def solved(self, dataset: FlowDataset, sequences: Sequence[Sequence[int]]) -> Iterator[Solved]:
        """Solve pairs, given as runs of indices that follow each other, under every setting."""
        order = [(index, place > 0) for run in sequences for place, index in enumerate(run)]
        states: dict[SolveSetting, State] = {}
        for (index, follows), sample in zip(order, read_ahead(dataset, [index for index, _ in order]), strict=True):
            if not follows:
                states.clear()
            predictions = []
            for setting in self.settings:
                predictions.append(self.solve(sample, setting, states.get(setting)))
                if setting.warm:
                    states[setting] = predictions[-1].state
            yield Solved(index, follows, sample, predictions)

    def records(self, dataset: FlowDataset, sequences: Sequence[Sequence[int]]) -> Iterator[Record]:
        """Solve pairs as ``solved`` does, and measure them."""
        for pair in self.solved(dataset, sequences):
            outcomes = [
                Outcome(int(prediction.iterations), measure(to_array(prediction.flow), pair.sample))
                for prediction in pair.predictions
            ]
            yield Record(pair.index, pair.sample.name, pair.follows, tuple(outcomes))


def read_ahead(dataset: FlowDataset, indices: Iterable[int]) -> Iterator[Sample]:
    """The samples of these indices, in order, decoded in the background while the one before is worked on."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        pending: deque[Future[Sample]] = deque()
        for index in indices:
            pending.append(pool.submit(dataset.__getitem__, index))
            if len(pending) > READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def runs(dataset: FlowDataset, as_sequences: bool, limit: int | None = None) -> list[list[int]]:
    """The pairs of a data set as runs to be solved in order: its sequences, or each pair for itself.

    :param limit: only so many pairs, from the first on; a sequence may be cut.
    """
    whole = dataset.sequences() if as_sequences else [[index] for index in range(len(dataset))]
    left = len(dataset) if limit is None else limit
    kept = []
    for run in whole:
        if left <= 0:
            break
        kept.append(run[:left])
        left -= len(run)
    return kept


def gather(records: list[Record], processes: Processes) -> list[Record]:
    """The records of all processes in the order of the data set, on every process.

    :raises RuntimeError: if a pair was measured twice: the shares overlap.
    """
    merged = sorted((record for share in processes.gather(records) for record in share), key=lambda r: r.index)
    if len({record.index for record in merged}) != len(merged):
        raise RuntimeError("two processes measured the same pair")
    return merged


def results(records: Sequence[Record], settings: Sequence[SolveSetting]) -> list[dict[str, Any]]:
    """Per setting, over these records: the keys of ``results`` in docs/evaluation.md."""
    table = []
    for place, setting in enumerate(settings):
        outcomes = [record.outcomes[place] for record in records]
        table.append(
            {
                "start": "warm" if setting.warm else "cold",
                "iterations": setting.iterations,
                "tolerance_px": setting.tolerance_px,
                "mean_iterations": float(np.mean([o.iterations for o in outcomes])) if outcomes else None,
                "regions": by_region([outcome.regions for outcome in outcomes]),
            }
        )
    return table


def epe(record: Record, place: int) -> float | None:
    """Mean endpoint error in px of one pair under the setting at this place; None without any valid pixel."""
    tally = record.outcomes[place].regions["all"]
    return tally.error_px / tally.pixels if tally.pixels else None


def warm_reaches_cold(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each fixed number of cold iterations in ``results``, how few warm ones are as good; None where none are."""
    error: dict[str, dict[int, float]] = {"cold": {}, "warm": {}}
    for row in table:
        if row["tolerance_px"] is None and row["regions"] and row["regions"]["all"]["pixels"]:
            error[row["start"]][row["iterations"]] = row["regions"]["all"]["epe_px"]
    reached = []
    for count, target in error["cold"].items():
        enough = min((warm for warm, value in error["warm"].items() if value <= target), default=None)
        reached.append(
            {
                "cold_iterations": count,
                "cold_epe_px": target,
                "warm_iterations": enough,
                "warm_epe_px": None if enough is None else error["warm"][enough],
            }
        )
    return reached
