# SPDX-License-Identifier: Apache-2.0
"""Recipes from YAML files and changes to them.

A recipe file (``training/recipes/*.yaml``) holds the sections of ``Recipe``, with what differs from the defaults there.
Beside them it may have ``sizes`` and ``variants``: sections that apply to one model size, or when a variant is asked
for. Later wins: defaults, file, size, variant, command line. That holds against stages, too: what a later layer sets in
``data`` or ``objective`` holds in every stage of an earlier one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import dacite
import yaml

from training.recipe import Model, Recipe, Source, Stage, hint
from training.schedule import RecipeError

RECIPES = Path(__file__).parent / "recipes"
_BESIDE = ("sizes", "variants")
_STAGED = tuple(name for name, kind in get_type_hints(Stage).items() if dataclasses.is_dataclass(kind))


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(
    name: str, *, size: str | None = None, variant: str | None = None, changes: Sequence[Mapping[str, Any]] = ()
) -> Recipe:
    """A recipe by name or path, for a size, in a variant, with changes.

    :param size: of the model; None is the recipe's own.
    :param variant: one of the recipe's ``variants``.
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
        _override_stages(values, layer)
    try:
        stages = enumerate(_stages(values), 1)
        values["stages"] = [_whole_stage(values, stage, f"{path}, stage {number}") for number, stage in stages]
        return dacite.from_dict(Recipe, values, _DACITE)
    except dacite.UnexpectedDataError as error:  # within a list of sources: the sections are checked above
        key = min(error.keys)
        known = [f.name for f in dataclasses.fields(Source)]
        raise RecipeError(f"{path}: unknown key {key!r} of a source{hint(key, known)}") from error
    except dacite.WrongTypeError as error:
        kind = error.field_type.__name__ if isinstance(error.field_type, type) else error.field_type
        raise RecipeError(f"{path}: {error.field_path}: expected {kind}, got {error.value!r}") from error
    except dacite.MissingValueError as error:
        raise RecipeError(f"{path}: {error.field_path} is missing") from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error


def parse_change(text: str) -> dict[str, Any]:
    """``section.key=value`` with a value in YAML, as a nested mapping.

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
            raise RecipeError(f"{where}: unknown key {path + str(key)!r}{hint(path + str(key), list(_leaves(Recipe)))}")
        if dataclasses.is_dataclass(types[key]):
            _merge(types[key], values.setdefault(key, {}), change, where, f"{path}{key}.")
        elif isinstance(values.get(key), dict) and isinstance(change, Mapping):
            values[key] = {**values[key], **change}
        else:
            values[key] = copy.deepcopy(change)


def _stages(values: Mapping[str, Any]) -> list[Any]:
    stages = values.get("stages") or []
    if not isinstance(stages, list):
        raise RecipeError(f"stages: expected a list, got {stages!r}")
    return stages


def _override_stages(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Take out of the stages of earlier layers what this one sets for the whole run."""
    if "stages" in layer:
        return
    for stage in _stages(values):
        for name in _STAGED:
            if isinstance(stage, dict) and isinstance(stage.get(name), dict):
                stage[name] = {k: v for k, v in stage[name].items() if k not in (layer.get(name) or {})}


def _whole_stage(values: Mapping[str, Any], stage: Any, where: str) -> dict[str, Any]:
    """A stage with all that the recipe has and it does not change."""
    whole: dict[str, Any] = {name: copy.deepcopy(values.get(name, {})) for name in _STAGED}
    _merge(Stage, whole, stage, where)
    return whole


def _leaves(section: Any, path: str = "") -> Iterator[str]:
    """The dotted names of all values of a section."""
    for name, type_ in get_type_hints(section).items():
        if dataclasses.is_dataclass(type_):
            yield from _leaves(type_, f"{path}{name}.")
        else:
            yield path + name


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
