# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the budget, and that of what iterations and scales are worth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from streams import frames

from benchmarks import controller, limits
from benchmarks.controller import LoadedClock
from benchmarks.sequences import CUTS, ImageSequence, without_truth
from deq_flow_ros.model import DEQFlow
from training.flow_dataset import Sample


def test_simulated_budgets_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: docs/budget.md quotes the table."""
    torch.set_num_threads(1)
    out = tmp_path / "out.json"
    assert controller.main(["--seconds", "1", "--budget-ms", "150", "--json", str(out)]) == 0
    accounts = json.loads(out.read_text())["accounts"]
    assert len(accounts) == 4 and all(account["frames"] > 3 for account in accounts)
    assert "used, %" in capsys.readouterr().out


def test_costs_follow_the_load_of_the_machine() -> None:
    """Why: the controller is judged by what this clock charges: at half speed, 80 ms of encoding take 160."""
    pixels = controller.HEIGHT * controller.WIDTH
    for slowness, factor in ((lambda _: 1.0, 1), (lambda _: 2.0, 2), (lambda t: 1.0 if t < 0.04 else 2.0, 1.5)):
        clock = LoadedClock(slowness, spread=0.0)
        clock.charge("encode", pixels)
        assert clock.now_ns() == pytest.approx(factor * 80e6, rel=1e-6)
    clock = LoadedClock(lambda _: 1.0, spread=0.2)
    for _ in range(500):
        clock.charge("encode", pixels)
    assert clock.now_ns() == pytest.approx(500 * 80e6, rel=0.05), "random, of the same mean"


def test_limits_are_measured_in_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: docs/budget.md takes the defaults of the estimator from the table."""
    torch.set_num_threads(1)
    stream, everywhere = frames(4, 128, 160), np.ones((128, 160), bool)
    truth = np.tile(np.array([-2, 0], np.float32), (128, 160, 1))
    pairs = [Sample(f"moving/{i}", stream[i], stream[i + 1], truth, everywhere, None) for i in range(3)]
    sequences = [ImageSequence(name, pairs) for name in ("slow", CUTS)]
    values = {"LIMITS": ((1, None), (3, None), (3, 100.0)), "every_sequence": lambda *_: iter(sequences)}
    for name, value in (values | {"SCALES": (1.0, 0.5), "ITERATIONS": (1, 2)}).items():
        monkeypatch.setattr(limits, name, value)
    out = tmp_path / "out.json"
    assert limits.main(["--only", "warm", "scales", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["settings"]
    made = [row["groups"]["slow"]["iterations"] for row in rows[:3]]
    assert made == [1, 3, 1]  # the update is below 100 px at once
    assert [(row["scale"], row["max_iterations"]) for row in rows[3:]] == [(1, 1), (1, 2), (0.5, 1), (0.5, 2)]
    assert all(list(row["groups"]) == ["slow"] and row["groups"]["slow"]["ms"] > 0 for row in rows)
    assert f"{rows[1]['groups']['slow']['epe_px']:.3f} (3.0)" in capsys.readouterr().out
    assert limits.main(["--model", "none"]) == 2


def test_where_there_is_no_truth_it_is_the_settled_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: of recordings nobody knows the flow; the distance from where a stream would end is what can be said."""
    monkeypatch.setattr(limits, "SETTLED", 2)
    torch.manual_seed(0)
    model, stream = DEQFlow("nano").eval().requires_grad_(False), frames(4)
    pairs = [without_truth(f"r/{i}", stream[i], stream[i + 1]) for i in range(3)]
    known = limits.with_settled(model, ImageSequence("r", pairs))
    same, other = (limits.measured(model, [known], 1.0, max_iterations=n)["r"]["epe_px"] for n in (2, 1))
    assert same == 0 and other > 0
