# SPDX-License-Identifier: Apache-2.0
"""What a run may not begin with, and what it must not replace: it leaves everything as it was, and says why."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_inputs import frames, pictures, table, write_folder

from deq_flow_ros.evaluation.command import parse_options
from deq_flow_ros.recordings import bags
from deq_flow_ros.recordings.bags import BagWriter
from deq_flow_ros.recordings.flow_files import write_flow

Evaluate = Callable[..., int]


def test_unusable_inputs_and_options_end_with_2_and_leave_nothing(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one sentence that says what to do."""
    with BagWriter(tmp_path / "two") as writer:
        for topic in ("/left", "/right"):
            writer.write_frame(topic, frames(pictures(1))[0])
    with BagWriter(tmp_path / "none") as writer:
        writer.write_diagnostics("/status", "engine", {}, 0, 0)
    folder, out = write_folder(tmp_path / "pictures", pictures(2)), tmp_path / "out"
    (mixed := tmp_path / "mixed").mkdir()
    for name in ("0.flo", "0.pfm"):
        write_flow(mixed / name, np.zeros((48, 64, 2), np.float32))
    for arguments, message in (
        ((tmp_path / "nowhere",), "nowhere does not exist"),
        ((tmp_path / "two",), "choose one with --topic: /left"),
        ((tmp_path / "none",), "holds no images"),
        ((folder, "--topic", "/left"), "only bags have topics"),
        ((folder, "--compare", "slow:speed=3"), "with the keys method, model"),
        ((folder, "--compare", "dis", "dis"), "got dis more than once"),
        ((folder, "--model", "missing.safetensors"), "missing.safetensors"),
        ((folder, "--truth", tmp_path / "two"), "holds no flow file"),
        ((folder, "--truth", mixed), "expected flow files of one format in"),
        ((folder, "--truth", tmp_path / "nowhere"), "expected a folder of flow files, got"),
        ((folder, "--stamps", "record"), "pictures is a folder; only bags have them"),
        ((tmp_path / "two", "--topic", "/left", "--fps", "10"), "two is a bag, which has times of its own"),
        ((folder, "--realtime", "--costs", folder / "0.png"), "expected a metrics.json of a run with --realtime"),
        ((folder, "--param", "refinement:=99"), "refinement must be a whole number from 0 to 20"),
    ):
        assert evaluate(*arguments, "--out", out) == 2
        assert message in capsys.readouterr().out
        assert not out.exists(), "there is nothing that --resume could go on with"
    for wrong, message in (
        ((), "expected a recording"),
        (("a", "--live", "--help"), "scripts/evaluate_bag --live"),
        (("a", "--bags", "b"), "expected a recording"),
        (("a", "--max-frames", "-1"), "at least 0"),
        (("a", "--costs", "c"), "give --realtime as well"),
        (("a", "--fps", "0"), "above 0"),
        (("a", "--resume", "--overwrite"), "give one of both"),
        (("a", "--images", "--no-bag"), "give one of both"),
        (("a", "--max-iterations", "0"), "at least 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse_options(wrong)
        assert message in capsys.readouterr().err


def test_a_run_that_cannot_start_leaves_earlier_results_as_they_are(evaluate: Evaluate, tmp_path: Path) -> None:
    """A misspelt value beside --overwrite must not cost what is there."""
    folder, out = write_folder(tmp_path / "pictures", pictures(3)), tmp_path / "out"
    assert evaluate(folder, "--out", out) == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert evaluate(folder, "--out", out, "--overwrite", "--param", "refinement:=99") == 2
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_results_and_foreign_files_are_not_overwritten(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that exists may hold the only copy of something."""
    folder, mine, theirs = write_folder(tmp_path / "pictures", pictures(3)), tmp_path / "mine", tmp_path / "theirs"
    (mine).mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (theirs / "flow").mkdir(parents=True)
    (theirs / "flow" / "0.flo").write_text("measured with a laser")
    (tmp_path / "file").write_text("")
    (tmp_path / "truth").mkdir()

    def refused(message: str, *arguments: object) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert evaluate(folder, *arguments) == 2
        assert message in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before

    refused("exists and holds thesis.txt", "--out", mine)
    assert evaluate(folder, "--out", mine, "--no-bag", "--overwrite") == 0
    assert (mine / "thesis.txt").read_text() == "years of work"
    refused("the results of a run; --overwrite replaces them", "--out", mine)
    refused("had another plan", "--out", mine, "--no-bag", "--resume", "--max-frames", 2)
    refused("cannot write", "--out", tmp_path / "file")
    for out in (folder, folder / "results", tmp_path):
        refused("inside of each other", "--out", out, "--overwrite")
    refused("inside of each other", "--out", tmp_path / "truth" / "out", "--truth", tmp_path / "truth", "--overwrite")
    refused("holds flow, which no evaluation is known to have written", "--out", theirs, "--overwrite")
    (mine / "flow").mkdir()
    (mine / "flow" / "0.flo").write_text("measured with a laser")
    refused("is left alone", "--out", mine, "--overwrite")  # the run in there has left no bag
    (mine / "flow" / "0.flo").unlink()
    with (mine / ".run" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("another run writes to", "--out", mine, "--overwrite")
    monkeypatch.setattr(bags, "RECORDED_BYTES", 10**12)
    assert evaluate(folder, "--out", tmp_path / "large") == 2
    assert "make room" in capsys.readouterr().out


def test_results_of_an_older_version_are_replaced_and_those_of_other_programs_are_not(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older live runs left no record of the run: the next `make demo` asked to move them away."""
    folder, out = write_folder(tmp_path / "pictures", pictures(3)), tmp_path / "out"
    assert evaluate(folder, "--out", out) == 0
    shutil.rmtree(out / ".run")
    assert evaluate(folder, "--out", out) == 2
    assert "holds the results of a run; --overwrite replaces them" in capsys.readouterr().out
    assert evaluate(folder, "--out", out, "--overwrite", "--max-frames", 2) == 0 and len(table(out)) == 2
    shutil.rmtree(out / ".run")
    (out / "metrics.json").write_text('{"version": 1, "settings": {}, "accuracy": 0.9}')
    assert evaluate(folder, "--out", out, "--overwrite") == 2
    assert "metrics.json, report.html, which no evaluation is known to have written" in capsys.readouterr().out
    assert len(table(out)) == 2
