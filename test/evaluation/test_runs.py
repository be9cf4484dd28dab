# SPDX-License-Identifier: Apache-2.0
"""Every frame of a recording, under every setting, once; and the simulated robot that takes what fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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

from deq_flow_ros.evaluation.command import read_costs
from deq_flow_ros.evaluation.methods import make_estimator
from deq_flow_ros.evaluation.records import FrameRecord, InputFrame
from deq_flow_ros.evaluation.runs import SettingRun, SimulatedRun, measure_setting
from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.media import flow_bag
from deq_flow_ros.media.bag_source import IMAGE
from deq_flow_ros.media.bags import BagWriter, read_image, read_messages
from deq_flow_ros.media.flow_files import write_flow
from deq_flow_ros.media.frame import Frame
from deq_flow_ros.model import DEQFlow, deq_flow
from deq_flow_ros.streaming.virtual_clock import CostTable, VirtualClock

PIXELS = 48 * 64


@pytest.fixture(scope="module")
def network() -> DEQFlow:
    torch.manual_seed(0)
    return DEQFlow("nano").eval().requires_grad_(False)


def flows(out: Path) -> dict[int, np.ndarray]:
    """Recorded flow by stamp."""
    return {
        message.header.stamp.sec * 10**9 + message.header.stamp.nanosec: read_image(message).copy()
        for _, _, message in read_messages(out / "flow", flow_bag.FLOW_TOPIC)
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
        every_frame = (flow_bag.IMAGE_TOPIC, flow_bag.STATISTICS_TOPIC)
        assert counts == {topic: 4 if topic in every_frame else 3 for topic in flow_bag.TOPICS}
        assert reader.start_time == FIRST_NS
        messages = [(item.topic, reader.deserialize(raw, item.msgtype)) for item, _, raw in reader.messages()]
    info = [message for topic, message in messages if topic == flow_bag.INFO_TOPIC][-1]
    assert info.k.tolist() == calibration["k"] and info.roi.do_rectify and info.distortion_model == "plumb_bob"
    assert info.header.stamp.sec * 10**9 + info.header.stamp.nanosec == FIRST_NS + 2 * PERIOD_NS, "that of its flow"
    accounts = [message for topic, message in messages if topic == flow_bag.STATISTICS_TOPIC]
    values = [{pair.key: pair.value for pair in message.status[0].values} for message in accounts]
    assert [account["outcome"] for account in values] == ["first", *["processed"] * 3]
    assert values[1]["image1_stamp_ns"] == str(FIRST_NS) and values[1]["iterations"] == "2"
    assert float(values[1]["photometric"]) > 0


def test_a_topic_is_taken_by_name(evaluate: Callable[..., int], tmp_path: Path) -> None:
    """Where there are several."""
    with BagWriter(tmp_path / "two") as writer:
        for frame, other in zip(frames(pictures(3)), frames(pictures(3, step=0)), strict=True):
            writer.write_frame(TOPIC, frame)
            writer.write_frame("/other", other)
    assert evaluate(tmp_path / "two", "--topic", "/other", "--out", tmp_path / "out", "--no-bag") == 0
    assert [row["photometric_still"] for row in table(tmp_path / "out", "any")[1:]] == ["0", "0"]


def as_truth(flow: np.ndarray, frame: Frame, **changes: Any) -> Frame:
    """A message of true flow with the stamp of a frame."""
    data = np.ascontiguousarray(flow, np.float32).reshape(-1).view(np.uint8)
    return replace(frame, data=data, step=512, encoding="32FC2", **changes)


def test_true_flow_comes_from_files_or_a_topic_and_is_of_frames_that_follow_each_other(
    evaluate: Callable[..., int], tmp_path: Path
) -> None:
    """A frame that cannot be read has true flow as well: it must neither be taken for another's nor shift the rest."""
    (tmp_path / "truth").mkdir()
    with BagWriter(tmp_path / "bag") as writer:
        for number, frame in enumerate(frames(pictures(5))):
            truth = np.full((48, 64, 2), [-10 - number, 0], np.float32)
            write_flow(tmp_path / "truth" / f"{number}.flo", truth)
            writer.write_frame("/truth", as_truth(truth, frame))
            if number == 1:
                writer.write_raw(TOPIC, IMAGE, bytes([0, 1, 0, 0]), frame.record_ns)
            else:
                writer.write_frame(TOPIC, frame)
    common = (tmp_path / "bag", "--topic", TOPIC, "--no-bag")
    for name, where in (("files", tmp_path / "truth"), ("topic", "/truth")):
        assert evaluate(*common, "--out", tmp_path / name, "--truth", where) == 1
        rows = table(tmp_path / name)
        assert [row["epe_still_px"] for row in rows] == ["", "", "12", "13"]
        assert [bool(row["epe_px"]) for row in rows] == [bool(row["fl_percent"]) for row in rows]


def test_true_flow_is_found_by_header_stamps_and_its_absence_told(
    evaluate: Callable[..., int], metrics_of: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """With the stamps of recording as well, and past a message that cannot be decoded; truth of no pair is a slip."""
    with BagWriter(tmp_path / "bag") as writer:
        for number, frame in enumerate(frames(pictures(5))):
            late = replace(frame, record_ns=frame.stamp_ns + 5 * PERIOD_NS)
            truth = as_truth(np.full((48, 64, 2), [-2, 0]), late)
            writer.write_frame(TOPIC, late)
            writer.write_frame("/elsewhere", replace(truth, stamp_ns=7))
            if number == 2:
                writer.write_raw("/truth", IMAGE, bytes([0, 1, 0, 0]), late.record_ns)
            else:
                writer.write_frame("/truth", truth)
    common = (tmp_path / "bag", "--topic", TOPIC, "--no-bag", "--stamps", "record")
    assert evaluate(*common, "--out", tmp_path / "out", "--truth", "/truth", "--compare", "dis") == 1
    for name in ("any", "dis"):
        rows = table(tmp_path / "out", name)
        assert [row["epe_still_px"] for row in rows] == ["", "2", "2", "", "2"]
        assert int(rows[0]["stamp_ns"]) == FIRST_NS + 5 * PERIOD_NS
    (problem,) = metrics_of(tmp_path / "out")["problems"]
    assert "on /truth that was recorded at" in problem and "cannot be decoded" in problem
    assert evaluate(*common, "--out", tmp_path / "none", "--truth", "/elsewhere") == 1
    (problem,) = metrics_of(tmp_path / "none")["problems"]
    assert problem.startswith("the true flow /elsewhere is known for none of the 4 pairs: its messages have to carry")


def costs(encode: float, iteration: float, spread: float = 0.0) -> CostTable:
    """ms per stage at 64x48."""
    varied = [iteration - spread, iteration, iteration + spread]
    return CostTable({PIXELS: {"encode": [encode], "coarse": [2 * encode], "iteration": varied, "output": [1.0]}})


def outcomes(run: SettingRun, count: int = 12) -> Iterator[FrameRecord]:
    for index, frame in enumerate(frames(pictures(count))):
        yield from (outcome.record for outcome in run.take(InputFrame.of(index, frame)))
    yield from (outcome.record for outcome in run.finish())


def test_flicker_is_measured_between_pairs_that_follow_each_other() -> None:
    """Across a gap the scene may be another one; and the first pair of a stream has nothing to be held against."""
    stream = [InputFrame.of(index, frame) for index, frame in enumerate(frames(pictures(6, step=0)))]
    stream[3:] = [replace(frame, stamp_ns=frame.stamp_ns + 10**10) for frame in stream[3:]]
    setting = Setting("dis", method="dis")
    run = SettingRun(setting, make_estimator(setting, None))
    records = [outcome.record for frame in stream for outcome in run.take(frame)]
    assert ["static_percent" in record.measures for record in records] == [False, False, True, False, False, True]


def simulate(model: DEQFlow, setting: Setting, table: CostTable) -> list[FrameRecord]:
    clock = VirtualClock(table)
    return list(outcomes(SimulatedRun(clock, PERIOD_NS, setting, make_estimator(setting, model, clock))))


def test_the_budget_decides_on_iterations_by_the_costs_of_the_table(network: DEQFlow) -> None:
    """10 ms of encoding, 1 ms of output, 4 ms an iteration: 3 of them fit into 25 ms and its reserve, not one more."""
    records = simulate(network, Setting("main", budget_ms=25.0, max_iterations=50, tolerance_px=None), costs(10.0, 4.0))
    assert [record.index for record in records] == list(range(12))
    assert [record.outcome for record in records] == ["first", *["processed"] * 11]
    warm = [record for record in records if record.warm]
    assert {record.iterations for record in warm} == {3} and {record.stop_reason for record in warm} == {"deadline"}
    assert {round(record.latency_ms, 6) for record in warm} == {23.0} and not any(record.over_budget for record in warm)
    assert all(record.stage_ms["encode"] == 10.0 and record.stage_ms["solve"] == 12.0 for record in warm)


def test_a_slow_machine_drops_all_but_the_newest(network: DEQFlow) -> None:
    """80 ms a frame at 30 Hz: two of three frames are superseded, and what waits is taken up when there is time."""
    records = simulate(network, Setting("main", budget_ms=None, max_iterations=1, tolerance_px=None), costs(75.0, 4.0))
    assert [record.index for record in records] == list(range(12)), "in the order of the stream, each once"
    dropped = [record for record in records if record.outcome == "dropped"]
    assert {record.reason for record in dropped} == {"superseded by a newer frame"} and 6 <= len(dropped) <= 8
    late = records[-1]
    assert late.outcome == "processed" and late.latency_ms == pytest.approx(80 + late.stage_ms["wait"], abs=0.01)
    assert 0 <= late.stage_ms["wait"] < 34


def test_the_same_costs_give_the_same_records(network: DEQFlow) -> None:
    """Costs vary as they were measured to, but in a fixed sequence: without that nothing could be compared."""
    setting = Setting("main", budget_ms=30.0, tolerance_px=None)
    first, second = (simulate(network, setting, costs(8.0, 4.0, spread=2.0)) for _ in range(2))
    assert first == second and len({record.latency_ms for record in first if record.warm}) >= 3
    assert simulate(network, setting, costs(8.0, 5.0, spread=2.0)) != first


def test_costs_are_measured_at_every_scale_and_survive_json(network: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is what makes a result repeatable elsewhere; its scales are those that the estimator chooses from."""
    monkeypatch.setattr("deq_flow_ros.streaming.virtual_clock.ROUNDS", 2)
    images = [np.kron(image, np.ones((3, 3, 1), np.uint8)) for image in pictures(3)]  # above the least processed size
    setting = Setting("main", budget_ms=30.0, max_iterations=1)
    measured = measure_setting(setting, network, images, [0.5])
    assert set(measured.stages) == {144 * 192, 126 * 168, 108 * 144}
    for known in measured.stages.values():
        assert {"encode", "prepare", "correlate", "iteration", "upsample", "output", "overhead"} <= set(known)
    again = CostTable.of(json.loads(json.dumps(measured.plain())))
    assert again.times("convert", 144 * 192) == [0.5]
    np.testing.assert_allclose(again.times("encode", 144 * 192), measured.times("encode", 144 * 192), atol=1e-4)
    quadratic = [4 * value for value in again.times("correlate", 144 * 192)]
    assert again.times("correlate", 2 * 144 * 192) == pytest.approx(quadratic)
    monkeypatch.setattr(deq_flow, "MAX_PIXELS", 126 * 168)  # of a model that takes more memory
    assert set(measure_setting(setting, network, images).stages) == {126 * 168, 108 * 144}
    with pytest.raises(ValueError, match="expected a table of costs"):
        CostTable.of({"stage_ms_by_pixels": {"many": {}}})


def test_a_simulation_is_repeated_from_its_own_metrics(
    evaluate: Callable[..., int], metrics_of: Callable[[Path], dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the command line: measured once, then given back, all records and figures of the streams are the same."""
    monkeypatch.setattr("deq_flow_ros.streaming.virtual_clock.ROUNDS", 2)
    folder = write_folder(tmp_path / "pictures", pictures(6))
    common = (folder, "--realtime", "--budget-ms", 40, "--compare", "dis", "--no-bag")
    assert evaluate(*common, "--out", tmp_path / "one") == 0
    metrics = tmp_path / "one" / "metrics.json"
    assert set(read_costs(metrics)) == {"any", "dis"}
    assert evaluate(*common, "--out", tmp_path / "two", "--costs", metrics) == 0
    assert table(tmp_path / "one") == table(tmp_path / "two") and len(table(tmp_path / "one")) == 12
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
    assert one["settings"] == two["settings"] and one["mode"] == "realtime"
    assert one["run"]["played_seconds"] == pytest.approx(6 * PERIOD_NS * 1e-9)
