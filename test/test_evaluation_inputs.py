# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with recordings and folders is named, nothing is lost, and the exit status tells."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluation_inputs import TOPIC, frames, pictures, table, write_bag, write_folder, write_model

from deq_flow_ros.evaluation import output_bag, provenance, session
from deq_flow_ros.evaluation.command import main, parse_options
from deq_flow_ros.evaluation.output_bag import FlowBag
from deq_flow_ros.evaluation.recordings import device_of, find_recordings, share
from deq_flow_ros.evaluation.settings import Setting, all_settings, parse_setting
from deq_flow_ros.media import MediaError
from deq_flow_ros.media.bag_source import IMAGE
from deq_flow_ros.media.bags import BagWriter

ROOT = Path(__file__).parents[1]
FAST = ("--compare", "dis", "--no-bag", "--consistency-every", "0", "--max-iterations", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "any.safetensors")


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of such short runs."""
    monkeypatch.setattr("deq_flow_ros.evaluation.report._plots", lambda *_: "")


def evaluate(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def problems(out: Path) -> list[str]:
    return json.loads((out / "metrics.json").read_text())["problems"]


def test_mixed_sizes_broken_stamps_and_unreadable_images_are_named_and_the_rest_evaluated(
    model: Path, tmp_path: Path
) -> None:
    """One recording with all of it: each frame has its account, and each kind of problem one sentence."""
    stream = frames(pictures(10))
    small = frames([cv2.resize(image, (32, 32)) for image in pictures(10)])
    stream[3] = replace(stream[3], encoding="rgb17")
    stream[5] = replace(stream[5], stamp_ns=stream[4].stamp_ns)
    stream[7:] = small[7:]
    bag = write_bag(tmp_path / "bag", stream)
    assert evaluate(bag, "--out", tmp_path / "out", "--model", model, *FAST) == 1
    rows = table(tmp_path / "out", "any")
    assert [row["outcome"][0] for row in rows] == list("fppdpfpfpp")
    assert "unknown encoding" in rows[3]["reason"] and "time stood still" in rows[5]["reason"]
    assert "size changed from 64x48 to 32x32" in rows[7]["reason"]
    said = "\n".join(problems(tmp_path / "out"))
    assert "frames that cannot be read: 1; the first is frame 3: unknown encoding" in said
    assert "frames that have a stamp that is not after the one before" in said and "frame 5" in said
    assert "frames that have another size than the one before: 1; the first is frame 7: 32x32 after 64x48" in said
    again = tmp_path / "again"
    assert evaluate(bag, "--out", again, "--model", model, *FAST, "--stamps", "record") == 1
    assert "have a stamp" not in "\n".join(problems(again)) and table(again, "any")[5]["outcome"] == "processed"


def test_a_truncated_bag_is_evaluated_as_far_as_it_goes(model: Path, tmp_path: Path) -> None:
    """And the status says that it was not all of it."""
    bag = write_bag(tmp_path / "bag", frames(pictures(10)))
    file = bag / "bag.mcap"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 6 // 10])
    assert evaluate(bag, "--out", tmp_path / "out", "--model", model, *FAST) == 1
    assert 4 <= len(table(tmp_path / "out", "any")) < 10 and "bag.mcap is damaged" in problems(tmp_path / "out")[0]


def test_unusable_inputs_and_options_end_with_2_and_leave_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one sentence that says what to do."""
    with BagWriter(tmp_path / "two") as writer:
        for topic in ("/left", "/right"):
            writer.write_frame(topic, frames(pictures(1))[0])
    with BagWriter(tmp_path / "none") as writer:
        writer.write_diagnostics("/status", "engine", {}, 0, 0)
    folder = write_folder(tmp_path / "pictures", pictures(2))
    for arguments, message in (
        ((tmp_path / "nowhere",), "nowhere does not exist"),
        ((tmp_path / "two",), "choose one with --topic: /left"),
        ((tmp_path / "none",), "holds no images"),
        ((folder, "--topic", "/left"), "only bags have topics"),
        ((folder, "--compare", "slow:speed=3"), "keys out of method, model"),
        ((folder, "--compare", "dis", "dis"), "got dis more than once"),
        ((folder, "--model", "missing.safetensors"), "missing.safetensors"),
        ((folder, "--truth", tmp_path / "two"), "holds no flow file"),
        ((folder, "--realtime", "--costs", folder / "0.png"), "expected a metrics.json of a run with --realtime"),
        ((folder, "--max-iterations", "0"), "max_iterations must be a whole number >= 1"),
    ):
        assert evaluate(*arguments, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().out
        assert not (tmp_path / "out" / "metrics.json").exists()
        if (tmp_path / "out").exists():
            assert evaluate(folder, "--out", tmp_path / "out", "--model", model, *FAST, "--overwrite") == 0
            shutil.rmtree(tmp_path / "out")
    for wrong in ((), ("a", "--bags", "b"), ("a", "--max-frames", "-1"), ("a", "--costs", "c")):
        with pytest.raises(SystemExit, match="2"):
            parse_options(wrong)


def test_results_and_foreign_files_are_not_overwritten(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that exists may hold the only copy of something."""
    folder = write_folder(tmp_path / "pictures", pictures(4))
    common = (folder, "--model", model, *FAST)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert evaluate(*common, "--out", tmp_path / "mine") == 2
    assert "exists and holds thesis.txt" in capsys.readouterr().out
    assert evaluate(*common, "--out", tmp_path / "mine", "--overwrite") == 0
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert evaluate(*common, "--out", tmp_path / "mine") == 2
    assert "the results of a run; --overwrite replaces them" in capsys.readouterr().out
    assert evaluate(*common, "--out", tmp_path / "mine", "--resume", "--max-frames", "2") == 2
    assert "had another plan" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert evaluate(*common, "--out", tmp_path / "file") == 2
    assert "cannot write" in capsys.readouterr().out
    for out in (folder, folder / "results", tmp_path):
        assert evaluate(*common, "--out", out, "--overwrite") == 2
        assert "lie in each other" in capsys.readouterr().out
    (tmp_path / "truth").mkdir()
    assert evaluate(*common, "--out", tmp_path / "truth" / "out", "--truth", tmp_path / "truth", "--overwrite") == 2
    assert "lie in each other" in capsys.readouterr().out
    (tmp_path / "mine" / "flow").mkdir()
    (tmp_path / "mine" / "flow" / "0.flo").write_text("measured with a laser")
    assert evaluate(*common, "--out", tmp_path / "mine", "--overwrite") == 2, "the run in there has left no bag"
    assert "is left alone" in capsys.readouterr().out and (tmp_path / "mine" / "flow" / "0.flo").exists()
    (tmp_path / "theirs" / "flow").mkdir(parents=True)
    (tmp_path / "theirs" / "flow" / "0.flo").write_text("measured with a laser")
    assert evaluate(*common, "--out", tmp_path / "theirs", "--overwrite") == 2
    assert "holds flow, which no run of this kind is known to have written" in capsys.readouterr().out
    assert (tmp_path / "theirs" / "flow" / "0.flo").read_text() == "measured with a laser"
    monkeypatch.setattr(output_bag, "RECORDED_BYTES", 10**12)
    bagged = [argument for argument in common if argument != "--no-bag"]
    assert evaluate(*bagged, "--out", tmp_path / "large") == 2
    assert "make room" in capsys.readouterr().out


def test_a_disk_that_gets_full_keeps_what_there_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of work must survive the last byte, and go on when there is room again."""
    folder = write_folder(tmp_path / "pictures", pictures(6))
    common = (folder, "--out", tmp_path / "out", "--model", model, *[one for one in FAST if one != "--no-bag"])
    add = FlowBag.add

    def full(bag: FlowBag, done: object, max_px: float = 0.0) -> None:
        if done.record.index == 4:  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(bag, done, max_px)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(FlowBag, "add", full)
    assert evaluate(*common) == 2
    assert "No space left" in capsys.readouterr().out and len(table(tmp_path / "out", "any")) == 5
    monkeypatch.setattr(FlowBag, "add", add)
    assert evaluate(*common, "--resume") == 0
    assert [int(row["index"]) for row in table(tmp_path / "out", "any")] == list(range(6))


def test_recordings_below_a_folder_are_found_and_shared(tmp_path: Path) -> None:
    """Every recording once, whoever takes it; what is hidden and the results are none."""
    data = tmp_path / "data"
    (data / "day" / ".trash").mkdir(parents=True)
    write_bag(data / "day" / "bag2", frames(pictures(1)))
    write_bag(data / "day" / "bag10", frames(pictures(1)))
    write_folder(data / "pictures", pictures(1))
    write_folder(data / "out", pictures(1))
    (data / "day" / "film.mp4").write_bytes(b"film")
    (data / "day" / ".trash" / "note.txt").write_bytes(b"empty it")
    cv2.imwrite(str(data / "day" / "photo.png"), pictures(1)[0])
    found = [str(path.relative_to(data)) for path in find_recordings(data, data / "out")]
    assert found == ["day/bag2", "day/bag10", "day/film.mp4", "pictures"]
    shares = [share(found, {"RANK": str(rank), "WORLD_SIZE": "3"}) for rank in range(3)]
    assert sorted(path for mine in shares for path in mine) == sorted(found) and share(found, {}) == found
    assert device_of("cuda", {"LOCAL_RANK": "2"}) == "cuda:2" and device_of("cpu", {"LOCAL_RANK": "2"}) == "cpu"
    with pytest.raises(MediaError, match="expected RANK from 0 to WORLD_SIZE - 1"):
        share(found, {"RANK": "3", "WORLD_SIZE": "3"})
    with pytest.raises(MediaError, match="holds no recording"):
        find_recordings(data / "day" / ".trash")
    assert [path.name for path in find_recordings(data / "day")] == ["bag2", "bag10", "film.mp4"]
    (data / "one").mkdir()
    (data / "one" / "run.mcap").touch()
    assert find_recordings(data / "one") == [data / "one" / "run.mcap"]
    for single in (data / "pictures", data / "day" / "bag2"):
        with pytest.raises(MediaError, match="a single one; leave out --bags"):
            find_recordings(single)


def test_a_recording_without_any_flow_is_no_success(model: Path, tmp_path: Path) -> None:
    """Whoever looks at the status only, or at the overview, must not take empty results for good ones."""
    stream = [replace(frame, stamp_ns=frame.stamp_ns * number) for number, frame in enumerate(frames(pictures(3)), 1)]
    for name, frames_of_it, why in (("one", stream[:1], "gave flow"), ("apart", stream, "2 x gap of … ms")):
        bag, out = write_bag(tmp_path / name, frames_of_it), tmp_path / f"{name}_out"
        assert evaluate(bag, "--out", out, "--model", model, *FAST) == 1
        (problem,) = problems(out)
        assert problem.startswith(f"none of the {len(frames_of_it)} frames gave flow") and why in problem


def test_a_message_that_cannot_be_decoded_does_not_end_a_batch(model: Path, tmp_path: Path) -> None:
    """Each recording has its results; the one with the broken message says so."""
    (tmp_path / "data").mkdir()
    with BagWriter(tmp_path / "data" / "a") as writer:
        for number, frame in enumerate(frames(pictures(5))):
            if number == 2:
                writer.write_raw(TOPIC, IMAGE, bytes([0, 1, 0, 0]), frame.record_ns)
            else:
                writer.write_frame(TOPIC, frame)
    write_bag(tmp_path / "data" / "b", frames(pictures(3)))
    assert evaluate("--bags", tmp_path / "data", "--out", tmp_path / "out", "--model", model, *FAST) == 1
    assert [len(table(tmp_path / "out" / name, "any")) for name in "ab"] == [4, 3]
    (problem,) = problems(tmp_path / "out" / "a")
    assert f"the message ({IMAGE}) on {TOPIC}" in problem and problems(tmp_path / "out" / "b") == []


def test_a_failing_disk_costs_one_recording_and_ctrl_c_is_heard_while_it_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading a large recording, to tell it from others, takes minutes, and is where a bad disk shows."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("a", "b"):
        write_bag(data / name, frames(pictures(3)))
    read = provenance.input_hash

    def failing(path: str) -> str:
        if path.endswith("a"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read(path)

    def interrupted(path: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return read(path)

    monkeypatch.setattr(provenance, "input_hash", failing)
    assert evaluate("--bags", data, "--out", out, "--model", model, *FAST) == 1
    said = capsys.readouterr().out
    assert f"cannot read {data / 'a'}" in said and "Input/output error" in said and len(table(out / "b", "any")) == 3
    monkeypatch.setattr(provenance, "input_hash", interrupted)
    assert evaluate(data / "a", "--out", tmp_path / "new", "--model", model, *FAST) == 130
    assert "interrupted" in capsys.readouterr().out and not (tmp_path / "new").exists()
    (out / "recordings.json").write_text("[]")
    assert evaluate("--bags", data, "--out", out, "--model", model, *FAST, "--resume") == 130
    assert [row["state"] for row in json.loads((out / "recordings.json").read_text())] == ["failed", "complete"]


def test_several_recordings_over_processes_one_of_them_broken(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's environment shares them out; a broken one is named and does not cost the others; and it resumes."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("a", "b"):
        write_bag(data / name, frames(pictures(3)))
    (data / "broken.bag").write_bytes(b"no bag")
    arguments = ["--bags", data, "--out", out, "--model", model, *FAST, "--resume"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    # a and broken.bag are those of 0; but torchrun ends all processes when one fails, so the last one to end says it.
    for rank, status in (("0", 0), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        assert evaluate(*arguments) == status
    overview = {row["results"]: row for row in json.loads((out / "recordings.json").read_text())}
    assert {name: row["state"] for name, row in overview.items()} == {
        "a": "complete", "b": "complete", "broken.bag": "failed",
    }  # fmt: skip
    assert "broken.bag" in overview["broken.bag"]["problems"][0]
    before = (out / "a" / "frames.csv").stat().st_mtime_ns
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert evaluate(*arguments) == 1 and (out / "a" / "frames.csv").stat().st_mtime_ns == before
    assert evaluate(*arguments[:-1]) == 2, "neither --resume nor --overwrite: what is there is refused, and as it was"
    assert json.loads((out / "recordings.json").read_text())[0]["state"] == "complete"


def test_settings_are_read_from_the_command_line() -> None:
    """What a setting does not name is that of the main one."""
    main_setting = Setting("main", model="tiny", budget_ms=40.0, direction="backward")
    first, second = all_settings(main_setting, ["cold:warm=false,budget_ms=none", "dis"])[1:]
    assert (first.warm, first.budget_ms, first.model, first.direction) == (False, None, "tiny", "backward")
    assert (second.method, second.solves, second.direction) == ("dis", False, "backward")
    for text, message in (
        ("x:warm=maybe", "expected warm to be true or false, got 'maybe'"),
        ("x:max_iterations=2.5", "expected max_iterations to be int, got '2.5'"),
        ("x:budget_ms=nan", "expected budget_ms"),
        ("x:name=y", "expected NAME:KEY=VALUE"),
        ("x:device=gpu", "expected the device cpu, cuda or cuda:N, got 'gpu'"),
        ("x:method=best", "expected a method out of deq, dis, farneback"),
        (":warm=true", "expected a name"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_setting(text, main_setting)


def test_topics_are_taken_by_name(model: Path, tmp_path: Path) -> None:
    """Where there are several."""
    with BagWriter(tmp_path / "two") as writer:
        for frame, other in zip(frames(pictures(3)), frames(pictures(3, step=0)), strict=True):
            writer.write_frame(TOPIC, frame)
            writer.write_frame("/other", other)
    assert evaluate(tmp_path / "two", "--topic", "/other", "--out", tmp_path / "out", "--model", model, *FAST) == 0
    assert np.allclose([float(row["photometric_still"]) for row in table(tmp_path / "out", "any")[1:]], 0)
