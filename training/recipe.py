# SPDX-License-Identifier: Apache-2.0
"""Recipes: everything that decides what is trained, on what and how, as one dataclass, from YAML and overrides.

A recipe file (`training/recipes/*.yaml`) holds the sections of `Recipe`, with what differs from the defaults here.
Beside them it may have `sizes` and `variants`: sections that apply to one model size, or when a variant is asked for.
Later wins: defaults, file, size, variant, command line.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import dacite
import yaml

from deq_flow_ros.model import SIZES, Architecture
from training.datasets import DATASETS
from training.objective import Objective
from training.schedule import Schedule

RECIPES = Path(__file__).parent / "recipes"
SYNTHETIC, PAIRS = "synthetic", "pairs"
_BESIDE = ("sizes", "variants")


class RecipeError(ValueError):
    """A recipe that cannot be used, and why."""


def _check(section: str, **checks: tuple[Any, bool, str]) -> None:
    for name, (value, ok, expected) in checks.items():
        if not ok:
            raise RecipeError(f"{section}.{name}: expected {expected}, got {value}")


@dataclass(frozen=True)
class Source:
    """A data set in training or validation.

    :ivar dataset: a name in `DATASETS`; "synthetic" for the procedural generator; "pairs" for a list of pairs in JSON
        (training/pairs.py), the way to your own data.
    :ivar repeat: how often each of its pairs comes up in one pass over the mix (training).
    :ivar limit: so many pairs, evenly spread over the data set (validation); None takes all.
    :ivar options: of the data set, see docs/datasets.md.
    :ivar augmentation: settings of `Augmentation` beside the crop (training); its sparse variant is chosen by the data.
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
            raise RecipeError(f"unknown data set {self.dataset!r}{_hint(self.dataset, names)}")
        _check(
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
        _check(
            "data",
            sources=([s.dataset for s in self.sources], bool(self.sources) and alone, "data sets, or synthetic alone"),
            batch=(self.batch, self.batch >= 1, "at least 1"),
            crop=(self.crop, all(side >= 16 and side % 8 == 0 for side in self.crop), "multiples of 8, from 16 on"),
            max_flow_px=(self.max_flow_px, self.max_flow_px > 0, "above 0"),
        )

    @property
    def synthetic(self) -> bool:
        """Whether the generator makes the data."""
        return self.sources[0].dataset == SYNTHETIC


@dataclass(frozen=True)
class Model:
    """What is trained: a size, and where it differs from it.

    :ivar update: the update operator, "raft", "gma" or one of your own (docs/models.md).
    """

    size: str = "nano"
    update: str = "raft"
    weight_norm: bool = False

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise RecipeError(f"model.size: expected one of {', '.join(SIZES)}, got {self.size!r}")

    @property
    def architecture(self) -> Architecture:
        """The size with these differences."""
        return dataclasses.replace(SIZES[self.size], update=self.update, weight_norm=self.weight_norm)


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
        _check(
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
        _check(
            "validation",
            every=(self.every, self.every >= 1, "at least 1"),
            iterations=(self.iterations, self.iterations >= 1, "at least 1"),
            coarse_levels=(self.coarse_levels, self.coarse_levels >= 0, "at least 0"),
        )


@dataclass(frozen=True)
class Recipe:
    """A training run, but for where it is written and on what machine.

    :ivar about: a line for people.
    :ivar init: weights to start from, with a fresh optimizer: a name or path as in `load_model`.
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

    def __post_init__(self) -> None:
        _check("recipe", seed=(self.seed, self.seed >= 0, "at least 0"))

    def root(self, dataset: str) -> str | None:
        """Where a data set lies: under its own name, or that of its family (up to the first dash)."""
        return self.data.roots.get(dataset, self.data.roots.get(dataset.split("-", 1)[0]))

    def to_yaml(self) -> str:
        """The whole recipe; `read_recipe` reads it back."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False, width=120)


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(
    name: str, *, size: str | None = None, variant: str | None = None, changes: Sequence[Mapping[str, Any]] = ()
) -> Recipe:
    """A recipe by name or path, for a size, in a variant, with changes.

    :param size: of the model; None is the recipe's own.
    :param variant: one of the recipe's `variants`.
    :param changes: nested as the sections are, later ones win; `parse_change` makes one from a line.
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
    if not isinstance(content, Mapping):
        raise RecipeError(f"{path}: expected sections, got {type(content).__name__}")
    sizes, variants = (content.get(key) or {} for key in _BESIDE)
    if variant is not None and variant not in variants:
        raise RecipeError(f"{path} has no variant {variant!r}; it has: {', '.join(variants) or 'none'}")
    values: dict[str, Any] = {}
    layers: list[tuple[Mapping[str, Any], str]] = [({k: v for k, v in content.items() if k not in _BESIDE}, str(path))]
    layers += [({"model": {"size": size}}, "--size")] if size else []
    chosen = size or _lookup(content, "model", "size") or Model().size
    layers += [(sizes[chosen], f"{path}, size {chosen}")] if chosen in sizes else []
    layers += [(variants[variant], f"{path}, variant {variant}")] if variant else []
    layers += [(change, "command line") for change in changes]
    for layer, where in layers:
        _merge(Recipe, values, layer, where)
    try:
        return dacite.from_dict(Recipe, values, _DACITE)
    except dacite.UnexpectedDataError as error:  # within a list of sources: the sections are checked above
        key = min(error.keys)
        known = [f.name for f in dataclasses.fields(Source)]
        raise RecipeError(f"{path}: unknown key {key!r} of a source{_hint(key, known)}") from error
    except dacite.WrongTypeError as error:
        kind = error.field_type.__name__ if isinstance(error.field_type, type) else error.field_type
        raise RecipeError(f"{path}: {error.field_path}: expected {kind}, got {error.value!r}") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def parse_change(text: str) -> dict[str, Any]:
    """`section.key=value` with a value in YAML, as a nested mapping.

    :raises RecipeError: if it is not such.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"expected KEY=VALUE, as schedule.steps=1000, got {text!r}")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r}: the value is not YAML: {error}") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _merge(section: type, values: dict[str, Any], changes: Any, where: str, path: str = "") -> None:
    """Put changes over values, refusing keys that the section's dataclass does not have."""
    if not isinstance(changes, Mapping):
        raise RecipeError(f"{where}: expected keys below {path.rstrip('.') or 'the recipe'}, got {changes!r}")
    types = get_type_hints(section)
    for key, change in changes.items():
        if key not in types:
            raise RecipeError(
                f"{where}: unknown key {path + str(key)!r}{_hint(path + str(key), list(_leaves(Recipe)))}"
            )
        if dataclasses.is_dataclass(types[key]):
            _merge(types[key], values.setdefault(key, {}), change, where, f"{path}{key}.")
        elif isinstance(values.get(key), dict) and isinstance(change, Mapping):
            values[key] = {**values[key], **change}
        else:
            values[key] = change


def _leaves(section: Any, path: str = "") -> Iterator[str]:
    """The dotted names of all values of a section."""
    for name, type_ in get_type_hints(section).items():
        if dataclasses.is_dataclass(type_):
            yield from _leaves(type_, f"{path}{name}.")
        else:
            yield path + name


def _hint(name: str, known: Sequence[str]) -> str:
    """The known name that was probably meant: near as a whole, or in its last part ("rate" for "schedule.rate")."""
    last = {leaf.rsplit(".", 1)[-1]: leaf for leaf in known}
    near = difflib.get_close_matches(name, known, 1, 0.7)
    near += [last[part] for part in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1)]
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _lookup(content: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        content = content.get(key) or {}
    return content or None


def _number(kind: type) -> Any:
    """YAML 1.1 reads 5e-4 as text and true is an integer to Python: mend the one, refuse the other."""

    def convert(value: Any) -> Any:
        if isinstance(value, bool):
            raise dacite.WrongTypeError(kind, value)
        if kind is float and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
        return float(value) if kind is float and isinstance(value, int) else value

    return convert


_DACITE = dacite.Config(cast=[tuple], strict=True, type_hooks={float: _number(float), int: _number(int)})


def _plain(value: Any) -> Any:
    """Tuples as lists: what YAML has."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
