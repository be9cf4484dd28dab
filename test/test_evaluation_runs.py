# SPDX-License-Identifier: Apache-2.0
"""Every frame of a recording, under every setting, once: whatever its form, and however often it was interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_inputs import (
    FIRST_NS,
    PERIOD_NS,
    TOPIC,
    frames,
    pictures,
    table,
    write_bag,
    write_compressed,
    write_folder,
    write_model,
    write_ros1,
)  # fmt: skip
from rosbags.highlevel import AnyReader

from deq_flow_ros.evaluation import session
from deq_flow_ros.evaluation.command import main
from deq_flow_ros.evaluation.folder import OccupiedError
from deq_flow_ros.evaluation.output_bag import (
    COLOR_TOPIC,
    FLOW_TOPIC,
    IMAGE_TOPIC,
    INFO_TOPIC,
    RESIDUAL_TOPIC,
    STATISTICS_TOPIC,
)
from deq_flow_ros.evaluation.runner import load_models, run
from deq_flow_ros.evaluation.session import Plan, Session
from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.media.bag_source import IMAGE
from deq_flow_ros.media.bags import BagWriter, read_image, read_messages
from deq_flow_ros.media.flow_files import write_flow
from deq_flow_ros.media.frame import Frame

ROOT = Path(__file__).parents[1]
FAST = ("--max-iterations", "2", "--tolerance-px", "0", "--consistency-every", "4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "any.safetensors")


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of such short runs."""
    if "compares" not in request.node.name:
        monkeypatch.setattr("deq_flow_ros.evaluation.report._plots", lambda *_: "")


def evaluate(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def flows(out: Path) -> dict[int, np.ndarray]:
    """Recorded flow by stamp."""
    return {
        message.header.stamp.sec * 10**9 + message.header.stamp.nanosec: read_image(message).copy()
        for _, _, message in read_messages(out / "flow", FLOW_TOPIC)
    }


def test_every_form_of_a_recording_gives_the_same_flow(model: Path, tmp_path: Path) -> None:
    """A conversion must not change a result: equal pixels and stamps, equal bits."""
    stream = frames(pictures())
    inputs = {
        "folder": write_folder(tmp_path / "in_folder", pictures()),
        "mcap": write_bag(tmp_path / "in_mcap", stream),
        "sqlite3": write_bag(tmp_path / "in_sqlite3", stream, "sqlite3"),
        "ros1": write_ros1(tmp_path / "in.bag", stream),
        "compressed": write_compressed(tmp_path / "in_compressed", stream),
    }
    setting = Setting("main", model=str(model), max_iterations=2)
    models = load_models([setting])
    found = {}
    for name, path in inputs.items():
        outcome = Session(str(path), tmp_path / name, Plan((setting,))).run(models, lambda *_: None, lambda: False)
        assert outcome.run.complete and outcome.run.problems == []
        found[name] = flows(tmp_path / name)
        assert sorted(found[name]) == [FIRST_NS + i * PERIOD_NS for i in range(7)]
    for name, own in found.items():
        for stamp, flow in own.items():
            np.testing.assert_array_equal(flow, found["folder"][stamp], err_msg=name)


def test_one_pass_compares_settings_on_the_same_frames(model: Path, tmp_path: Path) -> None:
    """Cold against warm, and against OpenCV's methods: a record per frame and setting, and one report of it."""
    folder = write_folder(tmp_path / "pictures", pictures())
    out = tmp_path / "out"
    assert evaluate(
        folder, "--out", out, "--model", model, *FAST, "--images", "--compare", "cold:warm=false", "dis", "farneback"
    ) == 0  # fmt: skip
    for name, warm in (("any", "1"), ("cold", "0"), ("dis", "0"), ("farneback", "0")):
        rows = table(out, name)
        assert [int(row["index"]) for row in rows] == list(range(8))
        assert [row["outcome"] for row in rows] == ["first", *["processed"] * 7]
        assert {row["warm"] for row in rows[2:]} == {warm}
        assert all(float(row["photometric"]) >= 0 for row in rows[1:])
        assert [bool(row["consistency_px"]) for row in rows] == [i in (1, 5) for i in range(8)]
    assert table(out, "dis")[1]["residual_px"] == "" and float(table(out, "any")[1]["residual_px"]) > 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["complete"] and len(metrics["input"]["sha256"]) == 64 and metrics["problems"] == []
    assert [entry["name"] for entry in metrics["settings"]] == ["any", "cold", "dis", "farneback"]
    assert (out / "report.html").stat().st_size > 10_000 and (out / "flow.mp4").exists()


def test_the_flow_bag_is_the_nodes_output_with_the_recordings_stamps(model: Path, tmp_path: Path) -> None:
    """It has to open wherever bags do, and say of each frame what the node would."""
    calibration = {
        "height": 48, "width": 64, "distortion_model": "plumb_bob", "d": [0.1] * 5, "k": [float(i) for i in range(9)],
        "r": [1.0, 0.0, 0.0] * 3, "p": [2.0] * 12, "binning_x": 0, "binning_y": 0,
        "roi": {"x_offset": 0, "y_offset": 0, "height": 0, "width": 0, "do_rectify": True},
    }  # fmt: skip
    bag = tmp_path / "bag"
    with BagWriter(bag) as writer:
        writer.write_camera_info(f"{TOPIC.rpartition('/')[0]}/camera_info", calibration, FIRST_NS, FIRST_NS, "camera")
        for frame in frames(pictures()):
            writer.write_frame(TOPIC, frame)
    assert evaluate(bag, "--out", tmp_path / "out", "--model", model, *FAST, "--images") == 0
    with AnyReader([tmp_path / "out" / "flow"]) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
        outputs = dict.fromkeys((FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, INFO_TOPIC), 7)
        assert counts == {IMAGE_TOPIC: 8, STATISTICS_TOPIC: 8, **outputs}
        assert reader.start_time == FIRST_NS and reader.message_count == sum(counts.values())
        connections = [item for item in reader.connections if item.topic == STATISTICS_TOPIC]
        accounts = [reader.deserialize(raw, item.msgtype) for item, _, raw in reader.messages(connections)]
        infos = [item for item in reader.connections if item.topic == INFO_TOPIC]
        info = [reader.deserialize(raw, item.msgtype) for item, _, raw in reader.messages(infos)][-1]
    assert info.k.tolist() == calibration["k"] and info.roi.do_rectify and info.distortion_model == "plumb_bob"
    assert info.header.stamp.sec * 10**9 + info.header.stamp.nanosec == FIRST_NS + 6 * PERIOD_NS, "that of its flow"
    values = [{pair.key: pair.value for pair in message.status[0].values} for message in accounts]
    assert [account["outcome"] for account in values] == ["first", *["processed"] * 7]
    assert values[1]["image1_stamp_ns"] == str(FIRST_NS) and values[1]["iterations"] == "2"


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_an_interrupted_run_goes_on_bit_by_bit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    """Stopped after three frames, killed after the checkpoint at the fifth: in the end all is as in one go."""
    bag = write_bag(tmp_path / "bag", frames(pictures()))
    common = (bag, "--model", model, *FAST, "--storage", storage, "--compare", "dis")
    assert evaluate(*common, "--out", tmp_path / "whole") == 0

    out = tmp_path / "parts"
    settings = tuple(json.loads((tmp_path / "whole" / ".run" / "run.json").read_text())["plan"]["settings"])
    plan = Plan(tuple(Setting(**values) for values in settings), consistency_every=4, storage=storage)
    models = load_models(plan.settings)
    seen: list[int] = []

    def show(done: int, total: int | None, latest: object) -> None:
        assert total == 8
        seen.append(done)

    with closing(Session(str(bag), out, plan)) as first:
        outcome = first.run(models, show, lambda: len(seen) == 3)
        with pytest.raises(OccupiedError, match="another run writes to"):
            Session(str(bag), out, plan, resume=True)
    assert not outcome.run.complete and seen == [1, 2, 3]

    monkeypatch.setattr(session, "CHECKPOINT_S", 0.0)

    def killed() -> bool:
        if len(seen) == 6:
            raise MemoryError("as by the kernel")
        return False

    with closing(Session(str(bag), out, plan, resume=True)) as second, pytest.raises(MemoryError):
        second.run(models, show, killed)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert evaluate(*common, "--out", out, "--resume") == 0
    whole, parts = flows(tmp_path / "whole"), flows(out)
    assert sorted(parts) == sorted(whole) and len(list((out / "flow").glob("flow_*"))) > 2
    for stamp, flow in whole.items():
        np.testing.assert_array_equal(parts[stamp], flow)
    for row, other in zip(table(tmp_path / "whole"), table(out), strict=True):
        same = [name for name in row if not name.startswith("stage_") and name != "latency_ms"]
        assert [row[name] for name in same] == [other[name] for name in same]
    assert evaluate(*common, "--out", out, "--resume") == 0, "complete: nothing to do"


def test_a_run_goes_on_only_from_what_it_kept_itself(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that a full disk or a crash has damaged, or of another version: told in words, and nothing is lost."""
    folder = write_folder(tmp_path / "pictures", pictures(4))
    out, state = tmp_path / "out", tmp_path / "out" / ".run"
    common = (folder, "--out", out, "--model", model, *FAST)
    assert evaluate(*common) == 0
    planned = json.loads((state / "run.json").read_text())["plan"]
    plan = Plan(**{**planned, "settings": (Setting(**planned["settings"][0]),)})
    Session(str(folder), out, plan, overwrite=True).run(load_models(plan.settings), lambda *_: None, lambda: True)
    whole = (state / "checkpoint.npz").read_bytes()
    with np.load(state / "checkpoint.npz") as arrays:
        kept = dict(arrays)

    def refused(words: str) -> None:
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        capsys.readouterr()
        assert evaluate(*common, "--resume") == 2
        said = capsys.readouterr().out
        assert words in said and "--overwrite" in said and "Traceback" not in said
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before

    place = whole.index(kept["0/learnt"].tobytes()) + 100
    for damaged in (b"", whole[:-30], whole[: len(whole) // 2], whole[:place] + b"~~" + whole[place + 2 :]):
        (state / "checkpoint.npz").write_bytes(damaged)
        refused("checkpoint.npz is damaged")
    for changed in ({"0/learnt": np.frombuffer(b"not learnt", np.uint8)}, {"problems": np.array("[")}):
        np.savez(state / "checkpoint.npz", **{**kept, **changed})
        refused("checkpoint.npz is damaged")
    (state / "checkpoint.npz").write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr("deq_flow_ros.evaluation.provenance.versions", lambda: {"deq_flow_ros": "0.0.1"})
        refused("another version of deq_flow_ros")
    assert evaluate(*common, "--resume") == 0 and len(table(out)) == 4


def test_ctrl_c_keeps_what_there_is(model: Path, tmp_path: Path) -> None:
    """Whoever stops a run of hours wants its results, a status that says so, and to go on later."""
    folder = write_folder(tmp_path / "pictures", pictures(60, step=1))
    arguments = [folder, "--out", tmp_path / "out", "--model", model, "--max-iterations", "30", "--tolerance-px", "0"]
    command = [sys.executable, "-m", "deq_flow_ros.ros.evaluate_bag", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / "frames.csv").exists() or len(table(tmp_path / "out")) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and "--resume goes on" in said
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = table(tmp_path / "out")
    assert not metrics["complete"] and 3 <= len(rows) < 60 and (tmp_path / "out" / "report.html").exists()
    assert len(flows(tmp_path / "out")) == len(rows) - 1


def test_true_flow_comes_from_files_or_a_topic(model: Path, tmp_path: Path) -> None:
    """The pictures move by 2 px to the left, so the endpoint error of no flow is 2."""
    images = pictures()
    truth = np.zeros((48, 64, 2), np.float32)
    truth[..., 0] = -2
    (tmp_path / "truth").mkdir()
    for number in range(7):
        write_flow(tmp_path / "truth" / f"{number}.flo", truth)
    folder = write_folder(tmp_path / "pictures", images)
    assert evaluate(folder, "--out", tmp_path / "files", "--model", model, *FAST, "--truth", tmp_path / "truth") == 0
    stream = frames(images)
    data = np.ascontiguousarray(truth).reshape(-1).view(np.uint8)
    with BagWriter(tmp_path / "bag") as writer:
        for frame in stream:
            writer.write_frame(TOPIC, frame)
            stamps = (frame.stamp_ns, frame.record_ns)
            writer.write_frame("/truth", Frame(data, 48, 64, 512, "32FC2", False, *stamps, "camera"))
    assert evaluate(tmp_path / "bag", "--out", tmp_path / "topic", "--model", model, *FAST, "--truth", "/truth") == 0
    for name in ("files", "topic"):
        rows = table(tmp_path / name)[1:]
        assert [float(row["epe_still_px"]) for row in rows] == [2.0] * 7
        assert all(row["epe_px"] and row["fl_percent"] for row in rows)


def test_true_flow_is_found_by_header_stamps_and_its_absence_told(model: Path, tmp_path: Path) -> None:
    """With the stamps of recording as well, and past a message that cannot be decoded; truth of no pair is a slip."""
    data = np.tile(np.array([-2, 0], np.float32), 48 * 64).view(np.uint8)
    with BagWriter(tmp_path / "bag") as writer:
        for number, frame in enumerate(frames(pictures())):
            late_ns = frame.stamp_ns + 5 * PERIOD_NS
            writer.write_frame(TOPIC, replace(frame, record_ns=late_ns))
            truth = Frame(data, 48, 64, 512, "32FC2", False, frame.stamp_ns, late_ns, "camera")
            writer.write_frame("/elsewhere", replace(truth, stamp_ns=7))
            if number == 3:
                writer.write_raw("/truth", IMAGE, bytes([0, 1, 0, 0]), late_ns)
            else:
                writer.write_frame("/truth", truth)
    common = (tmp_path / "bag", "--topic", TOPIC, "--model", model, *FAST, "--no-bag", "--stamps", "record")
    assert evaluate(*common, "--out", tmp_path / "out", "--truth", "/truth", "--compare", "dis") == 1
    for name in ("any", "dis"):
        rows = table(tmp_path / "out", name)
        assert [row["epe_still_px"] for row in rows] == ["", *["2"] * 3, "", *["2"] * 3]
        assert int(rows[0]["stamp_ns"]) == FIRST_NS + 5 * PERIOD_NS
    (problem,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["problems"]
    assert "on /truth that was recorded at" in problem and "cannot be decoded" in problem
    assert evaluate(*common, "--out", tmp_path / "none", "--truth", "/elsewhere") == 1
    (problem,) = json.loads((tmp_path / "none" / "metrics.json").read_text())["problems"]
    assert problem.startswith("the true flow /elsewhere is known for none of the 7 pairs: its messages have to carry")


def test_true_flow_is_of_frames_that_follow_each_other(model: Path, tmp_path: Path) -> None:
    """A frame that cannot be read has true flow as well: it must neither be taken for another's nor shift the rest."""
    (tmp_path / "truth").mkdir()
    with BagWriter(tmp_path / "bag") as writer:
        for number, frame in enumerate(frames(pictures(5))):
            truth = np.full((48, 64, 2), [-10 - number, 0], np.float32)
            write_flow(tmp_path / "truth" / f"{number}.flo", truth)
            data, stamps = truth.reshape(-1).view(np.uint8), (frame.stamp_ns, frame.record_ns)
            writer.write_frame("/truth", Frame(data, 48, 64, 512, "32FC2", False, *stamps, "camera"))
            if number == 1:
                writer.write_raw(TOPIC, IMAGE, bytes([0, 1, 0, 0]), frame.record_ns)
            else:
                writer.write_frame(TOPIC, frame)
    common = (tmp_path / "bag", "--topic", TOPIC, "--model", model, *FAST, "--no-bag")
    for name, where in (("files", tmp_path / "truth"), ("topic", "/truth")):
        assert evaluate(*common, "--out", tmp_path / name, "--truth", where) == 1
        assert [row["epe_still_px"] for row in table(tmp_path / name)] == ["", "", "12", "13"]


def test_frames_and_fields_of_one_setting_in_python(model: Path) -> None:
    """The generator that others build on: a record for every frame, fields for every pair."""
    setting = Setting("main", model=str(model), max_iterations=2, direction="backward")
    found = list(run(frames(pictures(4)), setting, consistency_every=2))
    assert [record.outcome for record, _ in found] == ["first", "processed", "processed", "processed"]
    assert [fields is not None and fields.backward is not None for _, fields in found] == [False, True, False, True]
    fields = found[1][1]
    assert fields is not None and fields.flow.shape == (48, 64, 2) and fields.here is fields.image2
