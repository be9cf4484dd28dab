# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the budget in its three forms: simulated, on this machine, and the measurement behind the rule."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from streams import frames

from benchmarks import controller
from benchmarks.sequences import ImageSequence
from benchmarks.simulated_load import LoadedClock, Scenario, possible_iterations
from deq_flow_ros.model import DEQFlow
from training.datasets import Sample


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
        controller.main(["--frames", "0"])
    assert "--frames: expected at least 1, got 0" in capsys.readouterr().err


def test_the_oracle_makes_as_many_iterations_as_fit() -> None:
    """Why: the controller is measured against it. 123.4 ms without iteration, 40 for each: 203.4 for two."""
    clock = LoadedClock(Scenario("steady", lambda _: 1.0, 0.0), seed=0)
    ends_ms = {123: 0, 203: 1, 204: 2, 1000: 12}
    assert {ms: possible_iterations(clock, 0, ms * 10**6, 1.0, 12) for ms in ends_ms} == ends_ms
    half_speed = LoadedClock(Scenario("slow", lambda _: 2.0, 0.0), seed=0)
    assert possible_iterations(half_speed, 0, 408 * 10**6, 1.0, 12) == 2


def test_a_recording_runs_in_real_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: the figures of a machine are those of its own clock; there is no oracle to compare with."""
    torch.set_num_threads(1)
    for number, image in enumerate(frames(4, 96, 128)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    out = tmp_path / "out.json"
    command = ["--input", str(tmp_path), "--frames", "5", "--budget-ms", "500", "--threads", "1", "--json", str(out)]
    assert controller.main(command) == 0
    (account,) = json.loads(out.read_text())["accounts"]
    assert account["frames"] == 5 and account["iterations"] >= 1 and account["of_oracle_percent"] is None
    assert controller.main(["--input", str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().out


def test_errors_are_measured_on_warm_pairs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: the rule for the scale is taken from them, and a cold pair would tell of the coarse start."""
    torch.manual_seed(0)
    stream = frames(4)
    truth, everywhere = np.tile(np.array([-2, 0], np.float32), (48, 64, 1)), np.ones((48, 64), bool)
    pairs = [Sample(f"moving/{i}", stream[i], stream[i + 1], truth, everywhere, None) for i in range(3)]
    sequence = ImageSequence("moving", pairs, (0, 1, 2))
    model = DEQFlow("nano").eval().requires_grad_(False)
    assert len(list(controller.stream_errors(model, sequence, 0.5, 1))) == 2
    monkeypatch.setattr(controller, "SCALES", (1.0, 0.5))
    monkeypatch.setattr(controller, "ITERATIONS", (1, 2))
    rows = controller.measured(model, [sequence])
    assert [(row["scale"], row["iterations"]) for row in rows] == [(1.0, 1), (1.0, 2), (0.5, 1), (0.5, 2)]
    assert all(np.isfinite(row["epe_px"]["moving"]) and row["ms"]["moving"] > 0 for row in rows)
