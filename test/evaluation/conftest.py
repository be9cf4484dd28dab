# SPDX-License-Identifier: Apache-2.0
"""What tests of evaluations share: a small model, the command in this process, and reports without plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_inputs import write_model

from deq_flow_ros.evaluation.command import main


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the right shape in a file called "any"; what the flow looks like does not matter."""
    return write_model(tmp_path_factory.mktemp("model") / "any.safetensors")


@pytest.fixture
def evaluate(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``evaluate_bag`` with that model and few iterations; returns its exit status.

    Without plots, which take most of the time of such short runs.
    """
    monkeypatch.setattr("deq_flow_ros.evaluation.report.run_plots", lambda *_: [])
    usual = ("--model", model, "--max-iterations", 2, "--param", "tolerance_px:=0", "--consistency-every", 0)

    def run(*arguments: object) -> int:
        return main([str(argument) for argument in (*usual, *arguments)])

    return run


@pytest.fixture
def metrics_of() -> Callable[[Path], dict[str, Any]]:
    """Reads the metrics in a folder of results."""
    return lambda out: json.loads((out / "metrics.json").read_text())
