# SPDX-License-Identifier: Apache-2.0
"""Recipes: everything that decides what is trained, on what and how, as one dataclass; and reading them from YAML.

A recipe file (``training/recipes/*.yaml``) holds sections of ``Recipe``, with what differs from the defaults. Under
``sizes`` and ``variants`` it may have further sections, for one model size or one variant. Of defaults, file, size,
variant and command line, each overrides those before it, and what it sets also holds in the stages that they have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from deq_flow_ros.model import SIZES, Architecture
from training.datasets import DATASETS, check_name
from training.objective import Objective
from training.settings import (
    CHECKED,
    Count,
    Flag,
    Natural,
    Optimization,
    Positive,
    RecipeError,
    Schedule,
    Share,
    Side,
    build,
)

RECIPES = Path(__file__).parent / "recipes"
SYNTHETIC, PAIRS = "synthetic", "pairs"
USES = 4  # of a clip at most: as it is, and mirrored along either axis or both
STAGED = ("data", "objective")  # the sections that a stage has of its own


@dataclass(frozen=True, config=CHECKED)
class Source:
    """A data set in training or validation."""

    dataset: str  # a name in ``DATASETS``, "synthetic" for the generator, or "pairs" for a list (docs/datasets.md)
    split: str = "train"
    repeat: Count = 1  # how often each of its pairs comes up in one pass over the mix (training)
    limit: Count | None = None  # so many pairs, evenly spread over the data set (validation)
    options: dict[str, Any] = field(default_factory=dict)  # of the data set, see docs/datasets.md
    augmentation: dict[str, Any] = field(default_factory=dict)  # settings of ``Augmentation`` (training)

    def __post_init__(self) -> None:
        check_name(self.dataset, [SYNTHETIC, PAIRS, *DATASETS])


def _family(dataset: str) -> str:
    return dataset.split("-", 1)[0]


@dataclass(frozen=True, config=CHECKED)
class Data:
    """What is trained on. From ``frames`` on, the settings are the generator's, see ``SceneSettings``."""

    sources: tuple[Source, ...] = (Source(SYNTHETIC),)  # the mix; the generator stands alone
    roots: dict[str, str] = field(default_factory=dict)  # folder or list, by a name or family, as "sintel"
    batch: Count = 4  # pairs, or clips of the generator, in a step
    crop: tuple[Side, Side] = (128, 192)  # height, width in px
    max_flow_px: Positive = 400.0  # longer flow is not trained on
    uses: Annotated[Count, Field(le=USES)] = 1  # how often each sample is trained on, see ``samples.transform``
    frames: Count = 3  # of a generated clip; from the third on, pairs start warm
    max_displacement_px: Positive | None = None
    textures: str | None = None
    patterns: Count = 120
    max_layers: Natural = 8
    particle_share: Share = 0.08
    fine_share: Share = 0.06
    photometric: Flag = True

    def __post_init__(self) -> None:
        names = [source.dataset for source in self.sources]
        if not names or (len(names) > 1 and SYNTHETIC in names):
            raise ValueError(f"sources: expected data sets, or synthetic alone, got {names}")
        for name in self.roots:
            check_name(name, sorted({PAIRS, *DATASETS, *map(_family, DATASETS)}))


@dataclass(frozen=True, config=CHECKED)
class Model:
    """What is trained: a size, and where it differs from it."""

    size: str = "nano"
    update: str = "raft"  # the update operator, "raft", "gma" or one of your own (docs/models.md)
    weight_norm: Flag = False
    # Channels of the head that predicts how wrong the flow is. Above 0, that head alone is trained, on the flow of the
    # weights in ``init`` (``UncertaintyLoss``).
    uncertainty: Natural = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {self.size!r}")

    @property
    def architecture(self) -> Architecture:
        """The size with these differences."""
        return replace(
            SIZES[self.size], update=self.update, weight_norm=self.weight_norm, uncertainty_dim=self.uncertainty
        )


@dataclass(frozen=True, config=CHECKED)
class Validation:
    """What the averaged weights are measured on, ``every`` so many steps; sets without a root are left out."""

    sets: tuple[Source, ...] = ()
    every: Count = 1000
    iterations: Count = 12
    coarse_levels: Natural = 2


@dataclass(frozen=True, config=CHECKED)
class Stage:
    """A part of a run, ``until`` a share of its steps or time; in a file, it holds what differs from the recipe's."""

    until: Positive
    data: Data
    objective: Objective


@dataclass(frozen=True, config=CHECKED)
class Recipe:
    """A training run, but for where it is written and on what machine."""

    about: str = ""  # a line for people
    seed: Natural = 0
    init: str | None = None  # weights to start from, with a fresh optimizer: a name or path as in ``load_model``
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    schedule: Schedule = field(default_factory=Schedule)
    optimization: Optimization = field(default_factory=Optimization)
    validation: Validation = field(default_factory=Validation)
    stages: tuple[Stage, ...] = ()  # in order, the last until 1; none if the whole run has the data and objective above

    def __post_init__(self) -> None:
        ends = [stage.until for stage in self.stages]
        if ends and (ends[-1] != 1 or any(a >= b for a, b in pairwise(ends))):
            raise ValueError(f"stages: expected rising shares from above 0 to 1 in until, got {ends}")
        if self.model.uncertainty and self.init is None:
            raise ValueError("model.uncertainty: expected --init WEIGHTS, to whose flow the head belongs, got none")

    def stage_at(self, progress: float) -> int:
        """The stage at a share of the run, 0 to 1, as an index; 0 if there are none."""
        return sum(progress >= stage.until for stage in self.stages[:-1])

    def in_stage(self, index: int) -> Recipe:
        """The recipe with the data and objective of a stage."""
        if not self.stages:
            return self
        stage = self.stages[index]
        return replace(self, data=stage.data, objective=stage.objective, stages=())

    def root(self, dataset: str) -> str | None:
        """Where a data set lies: under its own name, or that of its family (up to the first dash)."""
        return self.data.roots.get(dataset, self.data.roots.get(_family(dataset)))

    def to_yaml(self) -> str:
        """The whole recipe, of its stages what differs; ``read_recipe`` reads it back."""
        values = asdict(self)
        for stage in values["stages"]:
            for name in STAGED:
                stage[name] = {key: value for key, value in stage[name].items() if value != values[name][key]}
        return yaml.safe_dump(values, sort_keys=False, width=120)


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(
    name: str, *, size: str | None = None, variant: str | None = None, changes: Sequence[Mapping[str, Any]] = ()
) -> Recipe:
    """A recipe by name or path, for a size, in a variant, with changes.

    :param changes: nested as the sections are, later ones win; ``parse_change`` makes one from a line.
    :raises FileNotFoundError: if there is no such recipe.
    :raises RecipeError: for unknown keys, wrong types and impossible values, naming where.
    """
    path = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {name!r}: expected a YAML file or one of {', '.join(recipe_names())}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected sections, got {type(content).__name__}")
    special = {key: content.pop(key, None) or {} for key in ("sizes", "variants")}
    sizes, variants = build(dict[str, dict[str, dict[str, Any]]], special).values()
    if variant is not None and variant not in variants:
        raise RecipeError(f"{path} has no variant {variant!r}; it has: {', '.join(variants) or 'none'}")
    chosen = size or _section(content, "model").get("size", Model().size)
    of_variant = variants[variant] if variant else {}
    values: dict[str, Any] = {}
    for layer in (content, {"model": {"size": chosen}}, sizes.get(chosen, {}), of_variant, *changes):
        for stage in _stages(values):
            for name in STAGED:  # what this layer sets for the whole run
                if isinstance(stage.get(name, {}), Mapping):
                    stage[name] = {k: v for k, v in _section(stage, name).items() if k not in _section(layer, name)}
        values = _merged(values, layer)
    for stage in _stages(values):
        stage |= {name: _merged(_section(values, name), stage.get(name, {})) for name in STAGED}
    try:
        return build(Recipe, values)
    except RecipeError as error:
        raise RecipeError(f"recipe {path.name}: {error}") from None


def _merged(values: Any, changes: Any) -> Any:
    if not (isinstance(values, Mapping) and isinstance(changes, Mapping)):
        return copy.deepcopy(changes)
    return {**values, **{key: _merged(values.get(key), change) for key, change in changes.items()}}


def _section(values: Any, name: str) -> Mapping[str, Any]:
    section = values.get(name) if isinstance(values, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _stages(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = values.get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
