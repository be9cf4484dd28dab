# SPDX-License-Identifier: Apache-2.0
"""The benchmark that says which part of an image does not settle."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
import torch
from streams import frames

from benchmarks import unsettled


def test_the_pixels_that_move_most_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: docs/equilibrium.md says by it where the flow does not settle."""
    torch.set_num_threads(1)
    for number, frame in enumerate(frames(3, 64, 80)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), frame)
    out = tmp_path / "out.json"
    command = ["--sequence", str(tmp_path), "--models", "nano", "--iterations", "5", "--early", "2"]
    assert unsettled.main([*command, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["rest_px"] < row["moved_px"] and 0.05 < row["share"] <= 1
        assert row["last_px"] > 0 and row["smooth_cells_px"] < row["cells_px"]
        assert row["uncertainty_px"] > 0
    assert "last two" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        unsettled.main([*command, "--early", "4"])
    with pytest.raises(SystemExit):
        unsettled.main([])
