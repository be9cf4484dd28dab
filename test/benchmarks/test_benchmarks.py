# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, write what they print, and refuse what they cannot do. Their figures are not tested."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

import benchmarks
from benchmarks import accuracy, memory
from benchmarks.report import print_table
from deq_flow_ros.recordings.flow_files import write_flow


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A list with one pair of 64x80 px, 2 px apart, and its images as a sequence of four."""
    texture = cv2.GaussianBlur(np.random.default_rng(0).uniform(0, 255, (64, 100, 3)).astype(np.float32), (0, 0), 2)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(4):
        cv2.imwrite(str(frames / f"{number}.png"), texture[:, 2 * number : 2 * number + 80])
    write_flow(tmp_path / "flow.flo", np.tile(np.float32([-2, 0]), (64, 80, 1)))
    entry = {"name": "made/0", "image1": "frames/0.png", "image2": "frames/1.png", "flow": "flow.flo"}
    (tmp_path / "pairs.json").write_text(json.dumps([entry]))
    return tmp_path / "pairs.json"


def test_every_benchmark_is_listed() -> None:
    """Why: who has forgotten a name looks for it there."""
    modules = Path(benchmarks.__path__[0]).glob("*.py")
    commands = {path.stem for path in modules if "\nif __name__ ==" in path.read_text()}
    assert len(commands) > 10 and commands == set(re.findall(r"``(\w+)``", benchmarks.__doc__ or ""))


def test_a_table_shows_what_rows_have(capsys: pytest.CaptureFixture[str]) -> None:
    """Why: keys are names of groups and of files, and numbers; a dash is for what is missing alone."""
    row = {"name": "nano", "of": {"a.b": 1.5, "0001": [0.25], 2: np.inf}, "none": None}
    forms = ["{name}", "{of[a.b]:.2f}", "{of[0001][0]:.0%}", "{of[2]:.1f} px", "{none}", "{missing:.2f}"]
    print_table(Console(width=100), "made", {str(n): form for n, form in enumerate(forms)}, [row])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[4].strip("│").split("│")]
    assert cells == ["nano", "1.50", "25%", "- px", "-", "-"]


def test_errors_are_counted_of_every_method(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: the README and the cards of the weights quote its tables. The truth is 2 px, so that zero flow errs by 2."""
    out = tmp_path / "out.json"
    command = ["--pairs", str(pairs), "--iterations", "2", "--scale", "1", "--refinement", "1", "--dtype", "bfloat16"]
    assert accuracy.main([*command, "--threads", "1", "--json", str(out)]) == 0
    methods = json.loads(out.read_text())["methods"]
    names = ["nano, 2 from zero", "nano, 2 coarse to fine", "nano, 2 coarse to fine, refined"]
    assert list(methods) == [*names, "zero flow", "Farneback", "DIS fast", "DIS medium"]
    assert methods["zero flow"]["epe_px"] == {"made": 2.0, "mean": 2.0} and 0 < methods[names[0]]["distance_px"] < 0.5
    assert methods[names[1]]["pairs_epe_px"]["made/0"] < 1 and "2.000" in capsys.readouterr().out


def test_memory_is_counted_for_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: as above. The equilibrium must take less than the recurrent network at every place it is counted.

    Three methods of the five: what each of them stores is counted by test_memory.py.
    """
    every = memory.objectives()
    names = ("one-step", "implicit")
    monkeypatch.setattr(memory, "objectives", lambda: {name: every[name] for name in ("recurrent", *names)})
    out = tmp_path / "out.json"
    command = ["--size", "nano", "--height", "64", "--width", "64", "--iterations", "3", "--compare", "8"]
    assert memory.main([*command, "--threads", "1", "--json", str(out)]) == 0
    methods = json.loads(out.read_text())["methods"]
    assert len(every) == 5 and len(methods) == 6
    for name in names:
        assert methods[name]["saved_mib"]["3"] == methods[name]["saved_mib"]["8"]
        assert methods[name]["saved_mib"]["8"] < methods["recurrent"]["saved_mib"]["8"]
        assert methods[name]["peak_mib"] < methods["recurrent"]["peak_mib"]
        assert methods[f"{name}, recompute"]["saved_mib"]["8"] < methods[name]["saved_mib"]["8"]
    for wrong, message in ((["--compare", "1"], "at least 3"), (["--height", "60"], "--height: expected a multiple")):
        with pytest.raises(SystemExit, match="2"):
            memory.main(["--size", "nano", *wrong])
        assert message in capsys.readouterr().err
