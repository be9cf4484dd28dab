# SPDX-License-Identifier: Apache-2.0
"""Every frame of a recording, under every setting, once, with the true flow and the bag that belong to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
    write_ros1,
)  # fmt: skip
from rosbags.highlevel import AnyReader

from deq_flow_ros.evaluation.methods import Setting, make_estimator
from deq_flow_ros.evaluation.records import STAGES, InputFrame
from deq_flow_ros.evaluation.runs import SettingRun, unlike_number
from deq_flow_ros.model import load_model
from deq_flow_ros.recordings import bags
from deq_flow_ros.recordings.bag_reader import read_messages
from deq_flow_ros.recordings.bag_source import IMAGE
from deq_flow_ros.recordings.bags import BagWriter, read_image
from deq_flow_ros.recordings.flow_files import write_flow
from deq_flow_ros.streaming import FlowEstimator, costs


def flows(out: Path) -> dict[int, np.ndarray]:
    """Recorded flow by stamp."""
    return {
        message.header.stamp.sec * 10**9 + message.header.stamp.nanosec: read_image(message).copy()
        for _, _, message in read_messages(out / "flow", bags.FLOW_TOPIC)
    }


def test_every_form_of_a_recording_gives_the_same_flow(evaluate: Callable[..., int], tmp_path: Path) -> None:
    """A conversion must not change a result: equal pixels and stamps, equal bits."""
    stream = frames(pictures(5))
    inputs = {
        "folder": write_folder(tmp_path / "in_folder", pictures(5)),
        "sqlite3": write_bag(tmp_path / "in_sqlite3", stream, "sqlite3"),
        "ros1": write_ros1(tmp_path / "in.bag", stream),
        "compressed": write_compressed(tmp_path / "in_compressed", stream),
    }
    for name, path in inputs.items():
        assert evaluate(path, "--out", tmp_path / name) == 0
    expected = flows(tmp_path / "folder")
    assert sorted(expected) == [FIRST_NS + i * PERIOD_NS for i in range(4)]
    for name in inputs:
        found = flows(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[stamp], expected[stamp]) for stamp in expected), name


def test_every_stage_of_an_update_has_its_column() -> None:
    """A budget may change the scale in any run, and a stage that the table does not know would end it."""
    rare = {costs.PREPARE, costs.REENCODE, costs.SOLVE, costs.COARSE, costs.REFINE}
    assert {*costs.BEFORE_SOLVE, *costs.AFTER_SOLVE, *rare} <= set(STAGES)


def test_one_pass_compares_settings_on_the_same_frames(
    evaluate: Callable[..., int], metrics_of: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Cold against warm, and against OpenCV's methods: a record per frame and setting, and one report of it."""
    folder, out = write_folder(tmp_path / "pictures", pictures(6)), tmp_path / "out"
    compared = ("--compare", "cold:warm=false", "dis", "farneback", "--consistency-every", 4)
    assert evaluate(folder, "--out", out, "--direction", "backward", *compared) == 0
    for name, warm in (("any", "1"), ("cold", "0"), ("dis", "0"), ("farneback", "0")):
        rows = table(out, name)
        assert [int(row["index"]) for row in rows] == list(range(6))
        assert [row["outcome"] for row in rows] == ["first", *["processed"] * 5]
        assert {row["warm"] for row in rows[2:]} == {warm}
        assert all(float(row["photometric"]) >= 0 for row in rows[1:])
        assert [bool(row["consistency_px"]) for row in rows] == [i in (1, 5) for i in range(6)]
    assert table(out, "dis")[1]["residual_px"] == "" and float(table(out, "any")[1]["residual_px"]) > 0
    metrics = metrics_of(out)
    assert metrics["complete"] and len(metrics["input"]["sha256"]) == 64 and metrics["problems"] == []
    assert [entry["name"] for entry in metrics["settings"]] == ["any", "cold", "dis", "farneback"]
    assert (out / "report.html").stat().st_size > 10_000 and (out / "flow.mp4").exists()
    assert [int(stamp) for stamp in flows(out)] == [FIRST_NS + i * PERIOD_NS for i in range(1, 6)], "backward"


def test_the_flow_bag_is_the_nodes_output_with_the_recordings_stamps(
    evaluate: Callable[..., int], tmp_path: Path
) -> None:
    """It has to open wherever bags do, and say of each frame what the node would."""
    calibration = {
        "height": 48, "width": 64, "distortion_model": "plumb_bob", "d": [0.1] * 5, "k": [float(i) for i in range(9)],
        "r": [1.0, 0.0, 0.0] * 3, "p": [2.0] * 12, "binning_x": 0, "binning_y": 0,
        "roi": {"x_offset": 0, "y_offset": 0, "height": 0, "width": 0, "do_rectify": True},
    }  # fmt: skip
    with BagWriter(tmp_path / "bag") as writer:
        writer.write_camera_info(f"{TOPIC.rpartition('/')[0]}/camera_info", calibration, FIRST_NS, FIRST_NS, "camera")
        for frame in frames(pictures(4)):
            writer.write_frame(TOPIC, frame)
    assert evaluate(tmp_path / "bag", "--out", tmp_path / "out", "--images") == 0
    with AnyReader([tmp_path / "out" / "flow"]) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
        every_frame = (bags.IMAGE_TOPIC, bags.STATISTICS_TOPIC)
        recorded = [topic for topic in bags.TOPICS if topic != bags.UNCERTAINTY_TOPIC]  # no head for it
        assert counts == {topic: 4 if topic in every_frame else 3 for topic in recorded}
        assert reader.start_time == FIRST_NS
        messages = [(item.topic, reader.deserialize(raw, item.msgtype)) for item, _, raw in reader.messages()]
    info = [message for topic, message in messages if topic == bags.INFO_TOPIC][-1]
    assert info.k.tolist() == calibration["k"] and info.roi.do_rectify and info.distortion_model == "plumb_bob"
    assert info.header.stamp.sec * 10**9 + info.header.stamp.nanosec == FIRST_NS + 2 * PERIOD_NS, "that of its flow"
    accounts = [message for topic, message in messages if topic == bags.STATISTICS_TOPIC]
    values = [{pair.key: pair.value for pair in message.status[0].values} for message in accounts]
    assert [account["outcome"] for account in values] == ["first", *["processed"] * 3]
    assert values[1]["image1_stamp_ns"] == str(FIRST_NS) and values[1]["iterations"] == "2"
    assert float(values[1]["photometric"]) > 0


def test_the_uncertainty_is_recorded_where_the_weights_have_a_head_for_it(
    evaluate: Callable[..., int], tmp_path: Path
) -> None:
    """It is part of what the node says of its flow, and must be that of the same pair."""
    images, out = pictures(3), tmp_path / "out"
    folder = write_folder(tmp_path / "pictures", images)
    assert evaluate(folder, "--out", out, "--model", "nano", "--precision", "float32", "--compare", "dis") == 0
    found = [read_image(message) for _, _, message in read_messages(out / "flow", bags.UNCERTAINTY_TOPIC)]
    estimator = FlowEstimator(load_model("nano"), uncertainty=True, max_iterations=2, tolerance_px=None)
    results = [estimator.update(np.ascontiguousarray(bgr[..., ::-1]), stamp) for stamp, bgr in enumerate(images)]
    expected = [result.uncertainty for result in results if result is not None]
    assert len(found) == 2 and all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert "expected error" in (out / "report.html").read_text()


def test_a_topic_is_taken_by_name(evaluate: Callable[..., int], tmp_path: Path) -> None:
    """Where there are several."""
    with BagWriter(tmp_path / "two") as writer:
        for frame, other in zip(frames(pictures(3)), frames(pictures(3, step=0)), strict=True):
            writer.write_frame(TOPIC, frame)
            writer.write_frame("/other", other)
    assert evaluate(tmp_path / "two", "--topic", "/other", "--out", tmp_path / "out", "--no-bag") == 0
    assert [row["photometric_still"] for row in table(tmp_path / "out", "any")[1:]] == ["0", "0"]


def test_true_flow_comes_from_files_and_is_of_frames_that_follow_each_other(
    evaluate: Callable[..., int], metrics_of: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """A frame that cannot be read has true flow as well: it must neither be taken for another's nor shift the rest."""
    (tmp_path / "truth").mkdir()
    with BagWriter(tmp_path / "bag") as writer:
        for number, frame in enumerate(frames(pictures(5))):
            write_flow(tmp_path / "truth" / f"{number}.flo", np.full((48, 64, 2), [-10 - number, 0], np.float32))
            if number == 1:
                writer.write_raw(TOPIC, IMAGE, bytes([0, 1, 0, 0]), frame.record_ns)
            else:
                writer.write_frame(TOPIC, frame)
    common = (tmp_path / "bag", "--no-bag", "--truth", tmp_path / "truth")
    assert evaluate(*common, "--out", tmp_path / "out", "--compare", "dis") == 1
    for name in ("any", "dis"):
        rows = table(tmp_path / "out", name)
        assert [row["epe_still_px"] for row in rows] == ["", "", "12", "13"]
        assert [bool(row["epe_px"]) for row in rows] == [bool(row["fl_percent"]) for row in rows]
    assert unlike_number(str(tmp_path / "truth"), 5) == unlike_number(str(tmp_path / "truth"), 6) == []
    assert evaluate(*common, "--out", tmp_path / "none", "--direction", "backward") == 1
    problem = metrics_of(tmp_path / "none")["problems"][-1]
    assert "is known for none of the 3 pairs: its files must be forward flow between successive frames" in problem


def test_true_flow_of_another_number_of_frames_is_named(
    evaluate: Callable[..., int], metrics_of: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Files that begin with another frame than the recording would be compared with the wrong pairs."""
    folder, truth = write_folder(tmp_path / "pictures", pictures(3)), tmp_path / "truth"
    truth.mkdir()
    for number in range(5):
        write_flow(truth / f"{number}.flo", np.zeros((48, 64, 2), np.float32))
        (truth / f"._{number}.flo").write_bytes(b"of macOS")
    assert evaluate(folder, "--out", tmp_path / "out", "--no-bag", "--truth", truth) == 1
    (problem,) = metrics_of(tmp_path / "out")["problems"]
    assert "has 5 files, and the recording has 3 frames, which are 2 pairs: is the first file" in problem


def test_flicker_is_measured_between_pairs_that_follow_each_other() -> None:
    """Across a gap the scene may be another one; and the first pair of a stream has nothing to be held against."""
    stream = [InputFrame.of(index, frame) for index, frame in enumerate(frames(pictures(6, step=0)))]
    stream[3:] = [replace(frame, stamp_ns=frame.stamp_ns + 10**10) for frame in stream[3:]]
    setting = Setting("dis", method="dis")
    run = SettingRun(setting, make_estimator(setting, None))
    records = [record for frame in stream for record in run.take(frame)]
    assert ["static_percent" in record.measures for record in records] == [False, False, True, False, False, True]
