# SPDX-License-Identifier: Apache-2.0
"""Endpoint error of a model while it trains, on generated clips, data sets and lists of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deq_flow_ros.imaging.pictures import error_strip
from deq_flow_ros.model import DEQFlow
from training.batches import make_generator, open_source
from training.datasets import FlowDataset, Sample
from training.distributed import Processes
from training.pairs import clip_pairs, group_means, model_flow, pair_errors
from training.recipe import SYNTHETIC, Recipe

HELD_OUT_SEED = 2**32
"""Added to the seed of the run for the generated clips of validation, so that none of them is trained on."""


class GeneratedPairs(Sequence[Sample]):
    """The first pairs of clips that are never trained on."""

    def __init__(self, recipe: Recipe, count: int) -> None:
        self._generator, self._count = make_generator(recipe, recipe.seed + HELD_OUT_SEED), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(f"pair {index} of {self._count}")
        return clip_pairs(f"{SYNTHETIC}/{index}", self._generator.clips([index]))[0]


class Validator:
    """The pairs to validate on, shared among the processes.

    :ivar left_out: the sets of the recipe that nobody gave a folder for.
    """

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self._settings, self._processes = recipe.validation, processes
        self.left_out: list[str] = []
        self._pairs: list[tuple[Sequence[Sample] | FlowDataset, int]] = []
        for source in recipe.validation.sets:
            opened: list[Sequence[Sample] | FlowDataset]
            if source.dataset == SYNTHETIC:
                opened = [GeneratedPairs(recipe, source.limit or 16)]
            elif recipe.root(source.dataset) is None:
                self.left_out.append(source.dataset)
                continue
            else:
                opened = list(open_source(recipe, source))
            for pairs in opened:
                count = min(source.limit or len(pairs), len(pairs))
                self._pairs += [(pairs, i * len(pairs) // count) for i in range(count)]

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def __call__(self, model: DEQFlow) -> tuple[dict[str, float], np.ndarray | None]:
        """Mean endpoint error in px per set, and their mean as ``mean``; and a picture of the first pair, in rank 0.

        The figures are those of one process, whatever the number of processes.
        """
        function = model_flow(model, self._settings.iterations, self._settings.coarse_levels)
        measured, picture = [], None
        for number in range(self._processes.rank, len(self._pairs), self._processes.count):
            pairs, index = self._pairs[number]
            pair = pairs[index]
            flow = function(pair.image1, pair.image2)
            measured.append((number, pair.name, pair_errors(pair, flow)[0]))
            if number == 0 and pair.flow is not None:
                picture = error_strip(pair.image1, pair.flow, pair.valid, flow)
        everything = sorted(entry for part in self._processes.gather(measured) for entry in part)
        return group_means((name, error) for _, name, error in everything), picture
