# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the budget, and that of what iterations and scales are worth."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from streams import frames

from benchmarks import controller, limits
from benchmarks.controller import LoadedClock, Scenario, possible_iterations
from benchmarks.sequences import CUTS, ImageSequence, without_truth
from deq_flow_ros.model import DEQFlow
from training.flow_dataset import Sample


def test_simulated_budgets_are_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: docs/budget.md quotes the table and shows the picture."""
    torch.set_num_threads(1)
    out, picture = tmp_path / "out.json", tmp_path / "plot.png"
    command = ["--seconds", "1", "--budget-ms", "150", "--json", str(out), "--plot", str(picture)]
    assert controller.main(command) == 0
    accounts = json.loads(out.read_text())["accounts"]
    assert len(accounts) == 4 and all(account["frames"] > 3 for account in accounts)
    assert cv2.imread(str(picture)) is not None and "of oracle" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        controller.main(["--plot", "x.gif"])
    assert "ends in .png, .svg or .jpg, got x.gif" in capsys.readouterr().err, "said before the measurement"


def test_the_oracle_makes_as_many_iterations_as_fit() -> None:
    """Why: the controller is measured against it. 123.4 ms without iteration, 40 for each: 203.4 for two."""
    clock = LoadedClock(Scenario("steady", lambda _: 1.0, 0.0), seed=0)
    ends_ms = {123: 0, 203: 1, 204: 2, 1000: 12}
    assert {ms: possible_iterations(clock, 0, ms * 10**6, 1.0, 12) for ms in ends_ms} == ends_ms
    half_speed = LoadedClock(Scenario("slow", lambda _: 2.0, 0.0), seed=0)
    assert possible_iterations(half_speed, 0, 408 * 10**6, 1.0, 12) == 2


def test_limits_are_measured_in_streams_and_at_their_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: docs/budget.md takes the defaults of the estimator from the three tables."""
    torch.set_num_threads(1)
    stream, everywhere = frames(4, 128, 160), np.ones((128, 160), bool)
    truth = np.tile(np.array([-2, 0], np.float32), (128, 160, 1))
    pairs = [Sample(f"moving/{i}", stream[i], stream[i + 1], truth, everywhere, None) for i in range(3)]
    sequences = [ImageSequence(name, pairs, (1, 2)) for name in ("slow", CUTS)]
    values = {"LIMITS": ((1, None), (3, None), (3, 100.0)), "COARSE": (0, 1), "FINE": (1, 2)}
    values |= {"SCALES": (1.0, 0.5), "ITERATIONS": (1, 2), "every_sequence": lambda *_: iter(sequences)}
    for name, value in values.items():
        monkeypatch.setattr(limits, name, value)
    out = tmp_path / "out.json"
    assert limits.main(["--only", "warm", "cold", "scales", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    made = [row["groups"]["slow"]["iterations"] for row in figures["warm"]]
    assert made == [1, 3, 1]  # the update is below 100 px at once
    zero, coarse = (row["epe_px"] for row in figures["cold"])
    assert len(zero) == 2 and coarse != zero
    assert [(row["scale"], list(row["groups"]["slow"])) for row in figures["scales"]] == [
        (1, ["1", "2"]),
        (0.5, ["1", "2"]),
    ]
    assert all(row["groups"]["slow"]["2"]["ms"] > 0 for row in figures["scales"])
    said = capsys.readouterr().out
    assert f"{figures['warm'][1]['groups']['slow']['epe_px']:.3f} (3.0)" in said and "slow: error of warm" in said
    assert limits.main(["--model", "none"]) == 2


def test_where_there_is_no_truth_it_is_the_settled_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: of recordings nobody knows the flow; the distance from where a stream would end is what can be said."""
    monkeypatch.setattr(limits, "SETTLED", 2)
    torch.manual_seed(0)
    model, stream = DEQFlow("nano").eval().requires_grad_(False), frames(4)
    pairs = [without_truth(f"r/{i}", stream[i], stream[i + 1]) for i in range(3)]
    known = limits.with_settled(model, ImageSequence("r", pairs, (1, 2)))
    same, other = (limits.errors(model, [known], max_iterations=n) for n in (2, 1))
    assert same.epe_px.to_list() == [0, 0] and other.epe_px.min() > 0
