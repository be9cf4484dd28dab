# SPDX-License-Identifier: Apache-2.0
"""Recipes: those that come with the project are whole, any value can be changed, and a slip is refused with a hint."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deq_flow_ros.model import SIZES
from training import train
from training.datasets import DATASETS
from training.recipe import RECIPES, SYNTHETIC, Recipe, read_recipe, recipe_names
from training.samples import Augmentation
from training.settings import parse_change


def resolve(out: Path, *arguments: str) -> Recipe:
    return train.resolve(train.parse_arguments(["--out", str(out), *arguments]))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_holds_for_every_size_and_variant(name: str) -> None:
    """Why: a recipe that nobody has started yet must not fail after a day of downloading its data."""
    variants = yaml.safe_load((RECIPES / f"{name}.yaml").read_text()).get("variants", {})
    for size in SIZES:
        for variant in (None, *variants):
            recipe = read_recipe(name, size=size, variant=variant)
            assert recipe.model.size == size and recipe.about
            for source in recipe.data.sources:
                Augmentation(recipe.data.crop, **source.augmentation)
                assert source.dataset in {SYNTHETIC, *DATASETS}
    if name in ("chairs", "things", "sintel", "kitti"):
        assert read_recipe(name, variant="efficient").objective.gradient == "phantom-1"
        assert recipe.optimization.freeze_batch_norm == (name != "chairs")


def test_the_published_curriculum(tmp_path: Path) -> None:
    """Why: these figures are what makes a result comparable (RAFT, arXiv 2003.12039); no refactoring may move them."""
    published = {
        "chairs": (100_000, 10, 4e-4, 1e-4, 0.8, (368, 496)),
        "things": (100_000, 6, 1.25e-4, 1e-4, 0.8, (400, 720)),
        "sintel": (100_000, 6, 1.25e-4, 1e-5, 0.85, (368, 768)),
        "kitti": (50_000, 6, 1e-4, 1e-5, 0.85, (288, 960)),
    }
    for name, expected in published.items():
        r = read_recipe(name)
        assert (
            r.schedule.steps, r.data.batch, r.schedule.rate, r.optimization.weight_decay, r.objective.gamma, r.data.crop
        ) == expected  # fmt: skip
        assert (r.schedule.kind, r.schedule.rise, r.optimization.clip) == ("one-cycle", 0.05, 1.0)
    pairs = {"sintel-clean": 1041, "sintel-final": 1041, "kitti-2015": 200, "hd1k": 1047, "things-clean": 40302}
    counts = {s.dataset: s.repeat * pairs[s.dataset] for s in read_recipe("sintel").data.sources}
    assert (counts["sintel-clean"] + counts["sintel-final"]) / sum(counts.values()) == pytest.approx(0.71, abs=0.005)
    assert counts["kitti-2015"] / sum(counts.values()) == pytest.approx(0.135, abs=0.005)
    assert counts["hd1k"] / sum(counts.values()) == pytest.approx(0.02, abs=0.005)


def test_later_settings_win(tmp_path: Path) -> None:
    """Why: defaults, file, size, variant, command line: a change that is silently lost costs the whole run."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {size: tiny}\nobjective: {gamma: 0.1}\nschedule: {rate: 1e-4}\ndata: {batch: 2}\n"
        "sizes: {base: {objective: {gamma: 0.2}, data: {batch: 3}}}\nvariants: {fast: {objective: {gamma: 0.3}}}\n"
    )
    assert resolve(tmp_path, "--recipe", str(path)).objective.gamma == 0.1
    assert resolve(tmp_path, "--recipe", str(path), "--size", "base").objective.gamma == 0.2
    changed = resolve(
        tmp_path, "--recipe", str(path), "--size", "base", "--variant", "fast", "--set", "schedule.steps=7",
        "data.crop=[64, 80]", "--set", "schedule.rate=5e-4", "--data", "sintel=/a", "sintel-final=/b", "chairs=/c",
    )  # fmt: skip
    assert (changed.objective.gamma, changed.data.batch, changed.schedule.steps) == (0.3, 3, 7)
    assert changed.schedule.rate == 5e-4 and changed.data.crop == (64, 80)
    assert [changed.root(n) for n in ("sintel-clean", "sintel-final", "chairs", "hd1k")] == ["/a", "/b", "/c", None]
    again = tmp_path / "again.yaml"
    again.write_text(changed.to_yaml())
    assert read_recipe(str(again)) == changed


def test_stages_hold_what_differs_and_later_settings_win_over_them(tmp_path: Path) -> None:
    """Why: a change on the command line that a stage of the file undoes in silence costs the whole run."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: {batch: 2, crop: [32, 48]}\nobjective: {gamma: 0.7}\nstages:\n"
        "  - {until: 0.25, data: {batch: 4, crop: [16, 16]}}\n  - {until: 1, objective: {gamma: 0.9}}\n"
    )
    recipe = resolve(tmp_path, "--recipe", str(path), "--set", "data.batch=3", "data.uses=2")
    first, second = (recipe.in_stage(recipe.stage_at(progress)) for progress in (0.24, 0.25))
    assert (first.data.batch, first.data.crop, first.data.uses, first.objective.gamma) == (3, (16, 16), 2, 0.7)
    assert (second.data.batch, second.data.crop, second.objective.gamma) == (3, (32, 48), 0.9)
    assert recipe.stage_at(1.0) == 1 and Recipe().stage_at(0.5) == 0 and Recipe().in_stage(0) == Recipe()
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert read_recipe(str(again)) == recipe
    assert yaml.safe_load(again.read_text())["stages"][0]["data"] == {"crop": [16, 16]}
    given = resolve(tmp_path, "--recipe", str(path), "--set", "stages=[{until: 1, data: {batch: 7}}]", "data.uses=3")
    assert (given.in_stage(0).data.batch, given.in_stage(0).data.uses) == (7, 3)


def test_the_recipe_of_the_weights_that_ship() -> None:
    """Why: their cards and pages name it; a changed value would make other weights under the same name."""
    nano, base = (read_recipe("synthetic", size=size) for size in ("nano", "base"))
    for recipe in (nano, base):
        first, second = (recipe.in_stage(recipe.stage_at(progress)) for progress in (0.27, 0.29))
        assert [(s.data.batch, s.data.crop, s.data.max_displacement_px) for s in (first, second)] == [
            (16, (224, 320), 48), (8, (304, 432), 96)
        ]  # fmt: skip
        assert [s.objective.cold_iterations for s in (first, second)] == [(4, 24), (4, 32)]
        objective, schedule = recipe.objective, recipe.schedule
        assert (objective.draw, objective.warm_iterations, objective.perturbation_px) == ("log-uniform", (1, 8), 2)
        assert (schedule.kind, schedule.warmup, schedule.stable, recipe.optimization.ema) == (
            "trapezoid",
            300,
            0.6,
            0.999,
        )
    assert (nano.schedule.rate, nano.data.uses, base.schedule.rate, base.data.uses) == (6e-4, 2, 3.5e-4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("schedule.rat=1e-3", r"unknown key 'schedule.rat' \(did you mean 'schedule.rate'\?\)"),
        ("steps=5", r"unknown key 'steps' \(did you mean 'schedule.steps'\?\)"),
        ("zzz=5", "unknown key 'zzz': there are about, seed, init, model"),
        ("data.batch=two", "data.batch: expected a valid integer, got 'two'"),
        ("data.batch=1.5", "data.batch: expected a valid integer, got 1.5"),
        ("optimization.ema=true", "optimization.ema: expected a number, got True"),
        ("schedule.kind=cosine", "schedule.kind: expected 'trapezoid' or 'one-cycle', got 'cosine'"),
        ("schedule=5", "schedule: expected a dictionary .*, got 5"),
        ("data.crop=[50,64]", "data.crop.0: expected a multiple of 8, got 50"),
        ("data.crop=['128', 192]", "data.crop.0: expected a valid integer, got '128'"),
        ("model.weight_norm='yes'", "model.weight_norm: expected a valid boolean, got 'yes'"),
        ("data.batch=0", "data.batch: expected greater than or equal to 1, got 0"),
        ("model.size=giant", "model: size: expected one of nano, .*, got 'giant'"),
        ("data.sources=[{dataset: chair}]", r"unknown data set 'chair' \(did you mean 'chairs'\?\)"),
        ("data.sources=[{dataset: chairs, repet: 2}]", "unknown key 'data.sources.0.repet' .*data.sources.repeat"),
        ("data.sources=[]", r"sources: expected data sets, or synthetic alone, got \[\]"),
        ("objective.gradient=exact", "unknown gradient 'exact'"),
        ("schedule.steps", "expected KEY=VALUE"),
        ("stages=[{until: 0.5}]", r"stages: expected rising shares from above 0 to 1 in until, got \[0.5\]"),
        ("stages=[{until: 1, data: {bach: 2}}]", r"unknown key 'stages.0.data.bach' \(did you mean 'data.batch'\?\)"),
        ("stages=[{until: 1, data: 3}]", "stages.0.data: expected a dictionary .*, got 3"),
        ("stages=[{data: {batch: 2}}]", "stages.0.until is missing"),
        ("stages=3", "stages: expected a valid tuple, got 3"),
        ("schedule.cooldown=3", "unknown key 'schedule.cooldown': there are schedule.kind, schedule.steps, "),
        ("sizes={nano: 3}", "unknown key 'sizes'"),
    ],
)
def test_a_slip_is_refused(change: str, message: str) -> None:
    """Why: a key that is ignored or a value that is read as another is found out after days, if at all."""
    with pytest.raises(ValueError, match=message):
        read_recipe("synthetic", changes=[parse_change(change)])


def test_the_command_says_what_is_wrong_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: a message and an exit status, before anything is written; not a traceback."""
    for arguments, message in (
        (["--recipe", "chair"], "no recipe 'chair': expected a YAML file or one of chairs, kitti"),
        (
            ["--recipe", "chairs", "--variant", "cheap"],
            "has no variant 'cheap'; it has: efficient, implicit, recurrent",
        ),
        (["--recipe", "kitti"], "where is the data set kitti-2015? Give its folder: --data kitti-2015=FOLDER"),
        (["--recipe", "chairs", "--data", "chairs=/nowhere"], "the folder /nowhere of data set chairs does not exist"),
        (["--recipe", "chairs", "--data", "chair=/"], "unknown data set 'chair' (did you mean 'chairs'?)"),
    ):
        assert train.main(["--out", str(tmp_path / "out"), *arguments]) == 2
        said = capsys.readouterr().out
        assert message in said and "new run" not in said
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "out"), "--data", "chairs"])
    assert "--data: expected NAME=ROOT" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
