# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what iterations are worth, in a stream and at its start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from streams import frames

from benchmarks import limits
from benchmarks.sequences import CUTS, ImageSequence
from training.datasets import Sample


def test_both_tables_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: docs/budget.md takes the defaults of the estimator from them."""
    torch.set_num_threads(1)
    stream, everywhere = frames(4, 128, 160), np.ones((128, 160), bool)
    truth = np.tile(np.array([-2, 0], np.float32), (128, 160, 1))
    pairs = [Sample(f"moving/{i}", stream[i], stream[i + 1], truth, everywhere, None) for i in range(3)]
    sequences = [ImageSequence(name, pairs, (1, 2)) for name in ("slow", CUTS)]
    values = {"CAPS": (1, 3), "TOLERANCES": ((3, 100.0),), "COARSE": (0, 1), "FINE": (1, 2)}
    for name, value in (values | {"generated": lambda *_: iter(sequences)}).items():
        monkeypatch.setattr(limits, name, value)
    out = tmp_path / "out.json"
    assert limits.main(["--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert [row["groups"]["slow"][1] for row in figures["warm"]] == [1, 3, 1]  # the update is below 100 px at once
    zero, coarse = (row["epe_px"]["slow"] for row in figures["cold"])
    assert len(zero) == 2 and coarse != zero
    assert "cold pairs, slow" in capsys.readouterr().out
    assert limits.main(["--model", "none"]) == 2
