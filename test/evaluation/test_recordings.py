# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with recordings and folders is named, nothing is lost, and the exit status tells."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import forked
import numpy as np
import pytest
import torch
from evaluation_inputs import TOPIC, frames, pictures, table, write_bag, write_folder

from deq_flow_ros.evaluation.command import main
from deq_flow_ros.recordings import MediaError, open_source
from deq_flow_ros.recordings.bag_reader import read_messages
from deq_flow_ros.recordings.bag_source import IMAGE
from deq_flow_ros.recordings.bags import FLOW_TOPIC, BagWriter
from deq_flow_ros.recordings.files import find_recordings

Evaluate = Callable[..., int]
MetricsOf = Callable[[Path], dict[str, Any]]


def test_mixed_sizes_broken_stamps_and_unreadable_images_are_named_and_the_rest_evaluated(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path
) -> None:
    """One recording with all of it: each frame has its account, and each kind of problem one sentence."""
    stream = frames(pictures(10))
    small = frames([cv2.resize(image, (32, 32)) for image in pictures(10)])
    stream[3] = replace(stream[3], encoding="rgb17")
    stream[5] = replace(stream[5], stamp_ns=stream[4].stamp_ns)
    stream[7:] = small[7:]
    bag = write_bag(tmp_path / "bag", stream)
    assert evaluate(bag, "--out", tmp_path / "out", "--compare", "dis") == 1
    for setting in ("any", "dis"):
        rows = table(tmp_path / "out", setting)
        assert [row["outcome"][0] for row in rows] == list("fppdpdpfpp")
        assert "unknown encoding" in rows[3]["reason"]
        assert rows[5]["reason"] == "the same stamp as the frame before: left out"
        assert "size changed from 64x48 to 32x32" in rows[7]["reason"]
    said = "\n".join(metrics_of(tmp_path / "out")["problems"])
    assert "frames that cannot be read: 1; the first is frame 3: unknown encoding" in said
    assert "frames that have a stamp that is not after the one before" in said and "frame 5" in said
    assert (
        "frames that have another size than the one before (two cameras on one topic?): 1; the first is frame 7: size"
        in said
    )
    again = tmp_path / "again"
    assert evaluate(bag, "--out", again, "--stamps", "record", "--no-bag", "--max-frames", 6) == 1
    assert "have a stamp" not in "\n".join(metrics_of(again)["problems"])
    assert table(again, "any")[5]["outcome"] == "processed" and len(table(again)) == 6


def test_a_frozen_camera_and_two_cameras_on_one_topic_are_named(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path
) -> None:
    """Flow of zero from the same image again looks like a standstill; flow between two cameras looks like motion."""
    stream = frames([*[pictures(1)[0]] * 4, *pictures(6)[1:]])
    stream[6:] = [replace(one, frame_id="right" if n % 2 else one.frame_id) for n, one in enumerate(stream[6:])]
    stream[5] = replace(stream[5], encoding="rgb8")
    bag = write_bag(tmp_path / "bag", stream)
    assert evaluate(bag, "--out", tmp_path / "out", "--no-bag") == 1
    rows, said = table(tmp_path / "out", "any"), metrics_of(tmp_path / "out")["problems"]
    assert [row["repeated"] for row in rows] == ["", "1", "1", "1", "0", "", "", "", ""]
    assert "frame_id changed from 'camera' to 'right'" in rows[7]["reason"]
    assert "another frame_id than the one before (two cameras on one topic?): 2; the first is frame 7: " in said[0]
    assert "encoding than the one before (two cameras on one topic?): 2; the first is frame 5: encoding" in said[1]
    assert "exactly those before them, so that their flow is zero: 3 of 4; the first is frame 1; is the" in said[2]


def test_a_truncated_bag_is_evaluated_as_far_as_it_goes(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path
) -> None:
    """And the status says that it was not all of it."""
    bag = write_bag(tmp_path / "bag", frames(pictures(10)))
    file = bag / "bag.mcap"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 6 // 10])
    assert evaluate(bag, "--out", tmp_path / "out", "--no-bag") == 1
    assert 4 <= len(table(tmp_path / "out", "any")) < 10
    assert "bag.mcap is damaged" in metrics_of(tmp_path / "out")["problems"][0]


def test_a_disk_that_gets_full_keeps_what_there_is(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of hours of work must survive, and the bag open; it starts again when there is room."""
    folder, out = write_folder(tmp_path / "pictures", pictures(6)), tmp_path / "out"
    write_frame = BagWriter.write_frame

    def full(writer: BagWriter, topic: str, frame: Any) -> None:
        if topic == FLOW_TOPIC and frame.stamp_ns == frames(pictures(6))[3].stamp_ns:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_frame(writer, topic, frame)

    with monkeypatch.context() as patch:
        patch.setattr(BagWriter, "write_frame", full)
        assert evaluate(folder, "--out", out) == 2
    assert "No space left" in capsys.readouterr().out and len(table(out, "any")) == 5
    assert len(list(read_messages(out / "flow", FLOW_TOPIC))) == 3
    assert evaluate(folder, "--out", out) == 2
    assert "an interrupted run; --resume starts it again" in capsys.readouterr().out
    assert evaluate(folder, "--out", out, "--resume") == 0
    assert [int(row["index"]) for row in table(out, "any")] == list(range(6))
    assert len(list(read_messages(out / "flow", FLOW_TOPIC))) == 5
    assert sorted(file.name for file in out.rglob(".run/*")) == ["lock", "run.json"], "nothing else is left of it"


def test_a_device_with_too_little_memory_is_named_with_what_to_do(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large images on a small GPU ended in a traceback."""
    long = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4.00 GiB of which"

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError(long)

    monkeypatch.setattr("deq_flow_ros.streaming.FlowEstimator.update", full)
    folder = write_folder(tmp_path / "pictures", pictures(2))
    assert evaluate(folder, "--out", tmp_path / "out", "--no-bag") == 2
    said = "evaluate_bag: CUDA out of memory. Tried to allocate 2.00 GiB; compute smaller images (--param max_scale:="
    assert said in capsys.readouterr().out


def test_ctrl_c_keeps_what_there_is(model: Path, tmp_path: Path) -> None:
    """Whoever stops a run of hours wants its results, and a status that says so."""
    folder, out = write_folder(tmp_path / "pictures", pictures(60, step=1)), tmp_path / "out"
    arguments = [folder, "--out", out, "--model", model, "--max-iterations", "30", "--param", "tolerance_px:=0"]
    process = forked.start(main, arguments, tmp_path / "log")
    try:
        deadline = time.monotonic() + 300
        while not (out / "frames.csv").exists() or len(table(out)) < 3:
            assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(timeout=300)
    finally:
        process.kill()
    assert process.exitcode == 130 and "--resume starts again" in (tmp_path / "log").read_text()
    metrics, rows = json.loads((out / "metrics.json").read_text()), table(out)
    assert not metrics["complete"] and metrics["input"]["sha256"] == "" and 3 <= len(rows) < 60
    assert (out / "report.html").exists() and len(list(read_messages(out / "flow", FLOW_TOPIC))) == len(rows) - 1


def test_ctrl_c_before_the_first_frame_ends_at_once(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Costs take minutes to measure; and what the batch has done by then is on its page."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("a", "b"):
        write_bag(data / name, frames(pictures(3)))
    assert evaluate(data / "a", "--out", out / "a", "--realtime") == 0

    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr("deq_flow_ros.evaluation.recording.measure_setting", interrupted)
    assert evaluate("--bags", data, "--out", out, "--realtime", "--resume") == 130
    assert "--resume goes on" in capsys.readouterr().out and not (out / "b").exists()
    assert 'href="a/report.html"' in (out / "index.html").read_text()
    assert evaluate(data / "b", "--out", out / "b", "--realtime") == 130 and not (out / "b").exists()


def test_recordings_below_a_folder_are_found(tmp_path: Path) -> None:
    """Every recording once; what is hidden and the results are none."""
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
    with pytest.raises(MediaError, match="holds no recording"):
        find_recordings(data / "day" / ".trash")
    (data / "one").mkdir()
    (data / "one" / "run.mcap").touch()
    assert find_recordings(data / "one") == [data / "one" / "run.mcap"]
    (data / "one" / "back").symlink_to(data)
    (data / "one" / "inner").mkdir()
    cv2.imwrite(str(data / "one" / "inner" / "0.png"), pictures(1)[0])
    (data / "one" / "inner" / "metadata.yaml").write_text("camera: left\n")
    write_folder(data / "one" / "inner" / "more", pictures(1))
    found = [str(path.relative_to(data)) for path in find_recordings(data / "one")]
    assert found == ["one/inner", "one/inner/more", "one/run.mcap"], "no link back, no bag, and none hidden by a photo"
    for single in (data / "pictures", data / "day" / "bag2"):
        with pytest.raises(MediaError, match="a recording itself; omit --bags"):
            find_recordings(single)


def test_a_recording_without_any_flow_is_no_success(evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path) -> None:
    """Whoever looks at the status only, or at the overview, must not take empty results for good ones."""
    stream = [replace(frame, stamp_ns=600 * n * frame.stamp_ns) for n, frame in enumerate(frames(pictures(3)))]
    for name, frames_of_it, why in (("one", stream[:1], "gave flow"), ("apart", stream, "2 x gap of … ms")):
        bag, out = write_bag(tmp_path / name, frames_of_it), tmp_path / f"{name}_out"
        assert evaluate(bag, "--out", out) == 1
        (problem,) = metrics_of(out)["problems"]
        assert problem.startswith(f"none of the {len(frames_of_it)} frames gave flow") and why in problem
    assert open_source(tmp_path / "one").description.endswith(", 1 frame"), "which has no rate"


def test_a_batch_gets_past_what_is_broken_and_resumes_with_what_is_not_complete(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bag that cannot be read and a message that cannot be decoded are named, and do not cost the others."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    with BagWriter(data / "a") as writer:
        for number, frame in enumerate(frames(pictures(5))):
            if number == 2:
                writer.write_raw(TOPIC, IMAGE, bytes([0, 1, 0, 0]), frame.record_ns)
            else:
                writer.write_frame(TOPIC, frame)
    for name in ("b", "c"):
        write_bag(data / name, frames(pictures(3)))
    (data / "broken.bag").write_bytes(b"no bag")
    arguments = ("--bags", data, "--out", out, "--no-bag")

    def rows() -> dict[str, tuple[str, str]]:
        """State and problems of each recording, as the page over all of them has them."""
        page = (out / "index.html").read_text()
        row = r'<th>(.*?)</th>\s*<td class="state">(.*?)</td>.*?<td class="reason">(.*?)</td>'
        found = re.findall(row, page.partition("</tr>")[2], re.DOTALL)
        return {re.sub("<.*?>", "", name): (state, problem) for name, state, problem in found}

    assert evaluate(*arguments) == 1
    assert {name: state for name, (state, _) in rows().items()} == {
        "a": "complete", "b": "complete", "broken.bag": "failed", "c": "complete"
    }  # fmt: skip
    assert [len(table(out / name, "any")) for name in "abc"] == [4, 3, 3]
    (problem,) = metrics_of(out / "a")["problems"]
    assert f"the message ({IMAGE}) on {TOPIC}" in problem and metrics_of(out / "b")["problems"] == []
    page = (out / "index.html").read_text()
    assert "broken.bag" in rows()["broken.bag"][1] and problem.split("(")[0] in rows()["a"][1]
    assert 'href="b/report.html"' in page and "<th>latency, median [ms]</th>" in page

    shutil.rmtree(out / "c")  # as if the run had not come so far
    write_bag(data / "d", frames(pictures(4)))
    before = (out / "a" / "frames.csv").stat().st_mtime_ns
    (out / "d" / ".run").mkdir(parents=True)
    with (out / "d" / ".run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process is at work on it
        assert evaluate(*arguments, "--resume") == 2
    assert "another run writes to" in capsys.readouterr().out
    assert rows()["c"][0] == "complete" and rows()["d"][0] == "left as it was" and "another run" in rows()["d"][1]
    assert (out / "a" / "frames.csv").stat().st_mtime_ns == before
    assert evaluate(*arguments) == 2, "neither --resume nor --overwrite: what is there is refused, and as it was"
    assert metrics_of(out / "a")["complete"]
    (out / "index.html").write_text("mine")
    assert evaluate(*arguments, "--resume") == 2 and (out / "index.html").read_text() == "mine"


def test_results_that_are_damaged_or_of_other_frames_are_not_taken_for_complete(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path
) -> None:
    """A recording may have changed since, and a disk may have been full."""
    folder, out = write_folder(tmp_path / "pictures", pictures(3)), tmp_path / "out"
    assert evaluate(folder, "--out", out, "--no-bag") == 0
    assert evaluate(folder, "--out", out, "--no-bag", "--resume") == 0, "complete: nothing to do"
    (out / "metrics.json").write_text("{")
    assert evaluate(folder, "--out", out, "--no-bag", "--resume") == 0, "damaged: started again"
    assert metrics_of(out)["complete"]
    (out / ".run" / "run.json").write_text("{")
    assert evaluate(folder, "--out", out, "--no-bag") == 2 and evaluate(folder, "--out", out, "--overwrite") == 0
    cv2.imwrite(str(folder / "3.png"), np.zeros((48, 64, 3), np.uint8))
    assert evaluate(folder, "--out", out, "--no-bag", "--resume") == 2
    assert len(table(out)) == 3
