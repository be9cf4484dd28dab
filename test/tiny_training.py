# SPDX-License-Identifier: Apache-2.0
"""A training run small enough for tests: generated clips of 48x32 px, a few iterations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.recipe import Recipe, read_recipe
from training.settings import parse_change

CHANGES = (
    "data.crop=[32,48]", "data.batch=2", "data.frames=3", "data.patterns=4", "data.max_displacement_px=8",
    "objective.cold_iterations=[2,3]", "objective.warm_iterations=[1,2]", "objective.perturbation_px=2",
    "schedule.rate=3.5e-4", "schedule.warmup=1", "data.uses=1", "stages=[]",
    "validation.sets=[]",
)  # fmt: skip


def recipe(*changes: str) -> Recipe:
    """The procedural recipe with these changes, made small."""
    return read_recipe("synthetic", changes=[parse_change(text) for text in (*CHANGES, *changes)])


def arguments(out: Path, *changes: str) -> list[str]:
    """The same as a command line, logging every step."""
    return ["--out", str(out), "--workers", "0", "--log-every", "1", "--set", *CHANGES, *changes]


def log(out: Path) -> list[dict[str, Any]]:
    """The lines of the run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    """The loss of each step; a step that was logged twice must have had the same."""
    found: dict[int, float] = {}
    for entry in log(out):
        if "loss" in entry:
            assert found.setdefault(entry["step"], entry["loss"]) == entry["loss"], entry
    return found
