# SPDX-License-Identifier: Apache-2.0
"""What ``make gpu-check`` says on a machine without a card, and that a failure is one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_check


def test_without_a_card_the_rest_is_checked_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: a check that passes because it did nothing must say so."""
    asked_for = []

    def check_tests(files: tuple[str, ...]) -> gpu_check.Check:
        asked_for.extend(files)
        return gpu_check.Check("tests", "3 passed", "all pass", True)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "check_tests", check_tests)
    assert gpu_check.main([]) == 0
    assert tuple(asked_for) == gpu_check.LOGIC
    assert re.search(r"left out: PyTorch sees no\s+CUDA device here", capsys.readouterr().out)


def test_it_needs_no_more_than_it_says() -> None:
    """Why: CONTRIBUTING.md names what a machine with a card must have; an import that it lacks would end everything."""
    lacking = ("h5py", "matplotlib", "pandas", "rclpy", "rosbags", "tqdm", "yaml")
    program = f"import sys; sys.modules.update(dict.fromkeys({lacking})); import benchmarks.gpu_check"
    done = subprocess.run([sys.executable, "-c", program], cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_failure_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: it stands in scripts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "check_tests", lambda files: gpu_check.Check("tests", "1 failed", "all pass", False))
    assert gpu_check.main([]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_the_tests_that_it_names_are_there() -> None:
    """Why: pytest's error for a file that is not there would be taken for that of a test."""
    for name in (*gpu_check.LOGIC, *gpu_check.ON_CUDA):
        assert (Path(gpu_check.ROOT) / f"test/{name}.py").is_file()


def test_bounds_are_those_of_the_figures() -> None:
    """Why: a limit that is compared the wrong way round passes what is slow."""
    assert gpu_check.judged("ms", 1.5, "1.50", 1.6).passed and not gpu_check.judged("ms", 1.7, "1.70", 1.6).passed
    assert gpu_check.judged("rate", 700, "700", 600, least=True).passed
    slow = gpu_check.judged("rate", np.float64(500), "500", 600, least=True)
    assert slow.passed is False, "numpy's False would not be counted as a failure"
    assert gpu_check.judged("s", 9.0, "9 s", None).passed is None
