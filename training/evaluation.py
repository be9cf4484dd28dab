# SPDX-License-Identifier: Apache-2.0
"""Running a model over a data set: cold, or along sequences with the fixed point of one pair as start of the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from deq_flow_ros.equilibrium import State
from deq_flow_ros.imaging.pictures import error_strip
from deq_flow_ros.model import DEQFlow, Prediction
from deq_flow_ros.streaming.warm_start import carry
from training.batches import make_generator, open_source
from training.datasets import FlowDataset, Sample
from training.distributed import Processes
from training.generator import HELD_OUT_SEED, ProceduralGenerator
from training.pairs import (
    Tally,
    by_region,
    clip_pairs,
    group_means,
    measure,
    model_flow,
    pair_errors,
    to_array,
    to_tensor,
)
from training.recipe import SYNTHETIC, Recipe

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
class Solved:
    """A pair, its place in the data set, whether the pair before it was solved as well, a prediction per setting."""

    index: int
    follows: bool
    sample: Sample
    predictions: list[Prediction]


@dataclass(frozen=True)
class Record:
    """What is measured of a pair. Per setting: iterations at full resolution, and the tallies by region."""

    index: int
    name: str
    follows: bool
    iterations: list[int]
    regions: list[dict[str, Tally]]

    def epe(self, place: int) -> float | None:
        """Mean endpoint error in px under the setting at this place; None without any valid pixel."""
        tally = self.regions[place]["all"]
        return tally.error_px / tally.pixels if tally.pixels else None


class Evaluator:
    """A model with what stays the same for all pairs.

    :param settings: what to compare; not empty.
    :param coarse_levels: smaller resolutions that a cold start begins with, see ``DEQFlow.coarse_start``.
    :param solver: by name.
    """

    def __init__(
        self, model: DEQFlow, settings: Sequence[SolveSetting], coarse_levels: int = 0, solver: str = "picard"
    ) -> None:
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
            predictions = [self.solve(sample, setting, states.get(setting)) for setting in self.settings]
            states = {s: p.state for s, p in zip(self.settings, predictions, strict=True) if s.warm}
            yield Solved(index, follows, sample, predictions)

    def records(self, dataset: FlowDataset, sequences: Sequence[Sequence[int]]) -> Iterator[Record]:
        """Solve pairs as ``solved`` does, and measure them."""
        for pair in self.solved(dataset, sequences):
            regions = [measure(to_array(prediction.flow), pair.sample) for prediction in pair.predictions]
            iterations = [int(prediction.iterations) for prediction in pair.predictions]
            yield Record(pair.index, pair.sample.name, pair.follows, iterations, regions)


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
    kept = [[index for index in run if limit is None or index < limit] for run in whole]
    return [run for run in kept if run]


def results(records: Sequence[Record], settings: Sequence[SolveSetting]) -> list[dict[str, Any]]:
    """Per setting, over these records: the keys of ``results`` in docs/evaluation.md."""
    return [
        {
            "start": "warm" if setting.warm else "cold",
            "iterations": setting.iterations,
            "tolerance_px": setting.tolerance_px,
            "mean_iterations": float(np.mean([r.iterations[place] for r in records])) if records else None,
            "regions": by_region([record.regions[place] for record in records]),
            "pairs_epe_px": {record.name: record.epe(place) for record in records},
        }
        for place, setting in enumerate(settings)
    ]


def _generated(generator: ProceduralGenerator, number: int) -> Sample:
    return clip_pairs(f"{SYNTHETIC}/{number}", generator.clips([number]))[0]


class Validator:
    """The pairs on which a model is validated while it trains, shared among the processes.

    Generated ones are the first of clips that are never trained on.

    :ivar left_out: the sets of the recipe that nobody gave a folder for.
    """

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self._settings, self._processes = recipe.validation, processes
        self.left_out: list[str] = []
        self._pairs: list[Callable[[], Sample]] = []
        for source in recipe.validation.sets:
            if source.dataset == SYNTHETIC:
                generator = make_generator(recipe, recipe.seed + HELD_OUT_SEED)
                self._pairs += [partial(_generated, generator, number) for number in range(source.limit or 16)]
            elif recipe.root(source.dataset) is None:
                self.left_out.append(source.dataset)
            else:
                for dataset in open_source(recipe, source):
                    count = min(source.limit or len(dataset), len(dataset))
                    indices = (i * len(dataset) // count for i in range(count))
                    self._pairs += [partial(dataset.__getitem__, index) for index in indices]

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def __call__(self, model: DEQFlow) -> tuple[dict[str, float], np.ndarray | None]:
        """Mean endpoint error in px per set, and their mean as ``mean``; and a picture of the first pair, in rank 0.

        The figures are those of one process, whatever the number of processes.
        """
        function = model_flow(model, self._settings.iterations, self._settings.coarse_levels)
        measured, picture = [], None
        for number in range(self._processes.rank, len(self._pairs), self._processes.count):
            pair = self._pairs[number]()
            flow = function(pair.image1, pair.image2)
            measured.append((number, pair.name, pair_errors(pair, flow)[0]))
            if number == 0 and pair.flow is not None:
                picture = error_strip(pair.image1, pair.flow, pair.valid, flow)
        everything = sorted(entry for part in self._processes.gather(measured) for entry in part)
        return group_means((name, error) for _, name, error in everything), picture
