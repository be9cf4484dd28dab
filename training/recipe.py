# SPDX-License-Identifier: Apache-2.0
"""Recipes: everything that decides what is trained, on what and how, as one dataclass."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import yaml

from deq_flow_ros.model import SIZES, Architecture
from training.augmentation import USES
from training.datasets import DATASETS
from training.objective import Objective
from training.schedule import RecipeError, Schedule, check

SYNTHETIC, PAIRS = "synthetic", "pairs"


@dataclass(frozen=True)
class Source:
    """A data set in training or validation.

    :ivar dataset: a name in ``DATASETS``; "synthetic" for the procedural generator; "pairs" for a list of pairs in JSON
        (training/pairs.py), the way to your own data.
    :ivar repeat: how often each of its pairs comes up in one pass over the mix (training).
    :ivar limit: so many pairs, evenly spread over the data set (validation); None takes all.
    :ivar options: of the data set, see docs/datasets.md.
    :ivar augmentation: settings of ``Augmentation`` beside the crop (training); the data choose its sparse variant.
    """

    dataset: str
    split: str = "train"
    repeat: int = 1
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [SYNTHETIC, PAIRS, *DATASETS]
        if self.dataset not in names:
            raise RecipeError(f"unknown data set {self.dataset!r}{hint(self.dataset, names)}")
        check(
            f"source {self.dataset}",
            repeat=(self.repeat, self.repeat >= 1, "at least 1"),
            limit=(self.limit, self.limit is None or self.limit >= 1, "at least 1"),
        )


@dataclass(frozen=True)
class Data:
    """What is trained on.

    :ivar sources: the mix; the generator stands alone.
    :ivar roots: folder (or list) of each data set by name; one family may share an entry, "sintel" serves
        "sintel-clean" and "sintel-final".
    :ivar batch: pairs, or clips of the generator, in a step, over all processes together.
    :ivar crop: height, width in px, multiples of 8.
    :ivar max_flow_px: longer flow is not trained on.
    :ivar uses: how often each sample is trained on, 1 to 4: as it is, then mirrored horizontally, vertically and both,
        the flow as well, with its colour channels exchanged (training/augmentation.py). For where making a sample takes
        longer than a step.
    :ivar frames: of a generated clip; from the third on, pairs start warm.
    :ivar max_displacement_px: of the generator; None is a quarter of the width.
    :ivar textures: folder of photographs for the generator; None leaves procedural textures.
    :ivar patterns: different procedural textures.
    :ivar max_layers: of the generator, over the background.
    :ivar particle_share, fine_share: of the generator: shares of particle images, and of motion below a pixel.
    :ivar photometric: whether the generator changes light and colours and adds blur and noise.
    """

    sources: tuple[Source, ...] = (Source(SYNTHETIC),)
    roots: dict[str, str] = field(default_factory=dict)
    batch: int = 4
    crop: tuple[int, int] = (128, 192)
    max_flow_px: float = 400.0
    uses: int = 1
    frames: int = 3
    max_displacement_px: float | None = None
    textures: str | None = None
    patterns: int = 120
    max_layers: int = 8
    particle_share: float = 0.08
    fine_share: float = 0.06
    photometric: bool = True

    def __post_init__(self) -> None:
        alone = len(self.sources) == 1 or all(source.dataset != SYNTHETIC for source in self.sources)
        check(
            "data",
            sources=([s.dataset for s in self.sources], bool(self.sources) and alone, "data sets, or synthetic alone"),
            batch=(self.batch, self.batch >= 1, "at least 1"),
            crop=(self.crop, all(side >= 16 and side % 8 == 0 for side in self.crop), "multiples of 8, from 16 on"),
            max_flow_px=(self.max_flow_px, self.max_flow_px > 0, "above 0"),
            uses=(self.uses, 1 <= self.uses <= USES, f"1 to {USES}"),
        )

    @property
    def synthetic(self) -> bool:
        """Whether the generator makes the data."""
        return self.sources[0].dataset == SYNTHETIC


@dataclass(frozen=True)
class Model:
    """What is trained: a size, and where it differs from it.

    :ivar update: the update operator, "raft", "gma" or one of your own (docs/models.md).
    :ivar uncertainty: channels of the head that predicts how wrong the flow is. Above 0, that head alone is trained, on
        the flow of the weights in ``init``, which stay as they are (training/uncertainty.py).
    """

    size: str = "nano"
    update: str = "raft"
    weight_norm: bool = False
    uncertainty: int = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise RecipeError(f"model.size: expected one of {', '.join(SIZES)}, got {self.size!r}")
        check("model", uncertainty=(self.uncertainty, self.uncertainty >= 0, "at least 0"))

    @property
    def architecture(self) -> Architecture:
        """The size with these differences."""
        return dataclasses.replace(
            SIZES[self.size], update=self.update, weight_norm=self.weight_norm, uncertainty_dim=self.uncertainty
        )


@dataclass(frozen=True)
class Optimization:
    """AdamW and what surrounds it.

    :ivar clip: largest norm of the gradient.
    :ivar ema: decay of the averaged weights per step.
    :ivar freeze_batch_norm: use and keep the stored statistics; for every stage after the first, as RAFT does.
    :ivar precision: "auto" is bf16 on CUDA and fp32 on a CPU, where bf16 is slow without instructions for it.
    """

    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999
    freeze_batch_norm: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        check(
            "optimization",
            weight_decay=(self.weight_decay, self.weight_decay >= 0, "at least 0"),
            clip=(self.clip, self.clip > 0, "above 0"),
            ema=(self.ema, 0 <= self.ema < 1, "from 0 to below 1"),
        )


@dataclass(frozen=True)
class Validation:
    """What the averaged weights are measured on while training; the best are kept.

    :ivar sets: those without a root are left out, and named at the start.
    :ivar every: steps between two validations.
    """

    sets: tuple[Source, ...] = ()
    every: int = 1000
    iterations: int = 12
    coarse_levels: int = 2

    def __post_init__(self) -> None:
        check(
            "validation",
            every=(self.every, self.every >= 1, "at least 1"),
            iterations=(self.iterations, self.iterations >= 1, "at least 1"),
            coarse_levels=(self.coarse_levels, self.coarse_levels >= 0, "at least 0"),
        )


@dataclass(frozen=True)
class Stage:
    """A part of a run with data and objective of its own.

    In a recipe file, a stage's ``data`` and ``objective`` hold what differs from the recipe's.

    :ivar until: share of the run at which it ends, of the steps or of the time, whichever the schedule counts.
    """

    until: float
    data: Data
    objective: Objective


@dataclass(frozen=True)
class Recipe:
    """A training run, but for where it is written and on what machine.

    :ivar about: a line for people.
    :ivar init: weights to start from, with a fresh optimizer: a name or path as in ``load_model``.
    :ivar stages: in order, the last until 1; none if the whole run has the recipe's own data and objective. Validation
        is on the recipe's own data in all of them.
    """

    about: str = ""
    seed: int = 0
    init: str | None = None
    model: Model = Model()
    data: Data = Data()
    objective: Objective = field(default_factory=Objective)
    schedule: Schedule = field(default_factory=Schedule)
    optimization: Optimization = Optimization()
    validation: Validation = Validation()
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        ends = [stage.until for stage in self.stages]
        ordered = not ends or (ends[0] > 0 and ends[-1] == 1 and all(a < b for a, b in pairwise(ends)))
        check(
            "recipe",
            seed=(self.seed, self.seed >= 0, "at least 0"),
            stages=(ends, ordered, "rising shares from above 0 to 1 in until"),
        )
        if self.model.uncertainty and self.init is None:
            raise RecipeError("model.uncertainty: expected --init WEIGHTS, to whose flow the head belongs, got none")

    def stage_at(self, progress: float) -> int:
        """The stage at a share of the run, 0 to 1, as an index; 0 if there are none."""
        return sum(progress >= stage.until for stage in self.stages[:-1])

    def in_stage(self, index: int) -> Recipe:
        """The recipe with the data and objective of a stage."""
        if not self.stages:
            return self
        stage = self.stages[index]
        return dataclasses.replace(self, data=stage.data, objective=stage.objective, stages=())

    def root(self, dataset: str) -> str | None:
        """Where a data set lies: under its own name, or that of its family (up to the first dash)."""
        return self.data.roots.get(dataset, self.data.roots.get(dataset.split("-", 1)[0]))

    def to_yaml(self) -> str:
        """The whole recipe, of its stages what differs; ``read_recipe`` reads it back."""
        values = dataclasses.asdict(self)
        for stage in values["stages"]:
            for section in ("data", "objective"):
                own = values[section]
                stage[section] = {key: value for key, value in stage[section].items() if value != own[key]}
        return yaml.safe_dump(_plain(values), sort_keys=False, width=120)


def hint(name: str, known: Sequence[str]) -> str:
    """The known name that was probably meant, for a message of an error; all of them if none is near.

    Near as a whole, or in its last part ("rate" for "schedule.rate").
    """
    last = {leaf.rsplit(".", 1)[-1]: leaf for leaf in known}
    part = name.rsplit(".", 1)[-1]
    near = [last[part]] if part in last else difflib.get_close_matches(name, known, 1, 0.7)
    near += [last[match] for match in difflib.get_close_matches(part, last, 1)]
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _plain(value: Any) -> Any:
    """Tuples as lists: what YAML has."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
