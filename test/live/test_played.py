# SPDX-License-Identifier: Apache-2.0
"""A recorded run of the node is held against the pictures that were played, and some of its pairs are solved again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deq_flow_ros.evaluation.records import DROPPED, FIRST, PROCESSED
from deq_flow_ros.evaluation.report import SettingEntry
from deq_flow_ros.evaluation.results import ResultFolder, ResultWriter, RunInfo
from deq_flow_ros.imaging import frame_from_array
from deq_flow_ros.live.played import COLD, STREAMED, look_closer, read_run, solve_cold
from deq_flow_ros.model import load_model
from deq_flow_ros.recordings import Frame, MediaError, open_source
from deq_flow_ros.recordings.bag_reader import read_messages
from deq_flow_ros.recordings.bags import (
    FLOW_TOPIC,
    RESIDUAL_TOPIC,
    STATISTICS_TOPIC,
    BagWriter,
    FrameReport,
    report_of,
)
from deq_flow_ros.streaming import FlowEstimator

STEP_NS = 100_000_000
SHIFT = 3
"""The pictures move so many pixels to the right from one to the next."""
PLAYED = [number * STEP_NS for number in range(6)]


def picture(number: int) -> np.ndarray:
    texture = np.random.default_rng(0).integers(0, 256, (40, 160, 3), np.uint8)
    return texture[:, 90 - SHIFT * number : 154 - SHIFT * number]


def as_message(values: np.ndarray, encoding: str, stamp_ns: int) -> Frame:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    height, width = values.shape[:2]
    return Frame(data, height, width, data.size // height, encoding, False, stamp_ns, stamp_ns, "camera")


@pytest.fixture(scope="module", params=["forward", "backward"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Six pictures that move by `SHIFT`, and a recording of their flow, 0.5 px wrong; frame 3 was dropped."""
    direction, root = request.param, tmp_path_factory.mktemp("run")
    with BagWriter(root / "input") as writer:
        for number in range(6):
            stamp = number * STEP_NS
            writer.write_frame("/image", frame_from_array(picture(number)[:, :, ::-1], stamp, stamp, "camera"))
    with BagWriter(root / "output") as writer:
        previous = 0
        for number in (0, 1, 3, 2, 4, 5):  # a drop is reported before the frame in hand
            values = {"outcome": "processed", "direction": direction, "image2_stamp_ns": str(number * STEP_NS)}
            values |= {"iterations": "4", "warm": "true" if number > 1 else "false", "latency_ms": "30", "scale": "1"}
            values |= {"residual_px": "0.2", "budget_ms": "29.5", "stage_solve_ms": "20", "stop_reason": "converged"}
            if number in (0, 3):
                values = {"outcome": "first" if number == 0 else "dropped", "reason": "because", "direction": direction}
                writer.write_diagnostics(STATISTICS_TOPIC, "flow", values, number * STEP_NS, number)
                continue
            values["image1_stamp_ns"] = str(previous * STEP_NS)
            writer.write_diagnostics(STATISTICS_TOPIC, "flow", values, number * STEP_NS, number)
            sign = 1 if direction == "forward" else -1
            flow = np.zeros((40, 64, 2), np.float32)
            flow[..., 0] = sign * SHIFT * (number - previous) + 0.5
            here = (previous if direction == "forward" else number) * STEP_NS
            writer.write_frame(RESIDUAL_TOPIC, as_message(np.full((40, 64), 0.2, np.float32), "32FC1", here))
            writer.write_frame(FLOW_TOPIC, as_message(flow, "32FC2", here))
            previous = number
    return direction, root / "input", root / "output"


def exact(here: int, there: int) -> tuple[np.ndarray, np.ndarray]:
    flow = np.zeros((40, 64, 2), np.float32)
    flow[..., 0] = SHIFT * (there - here) / STEP_NS
    return flow, np.ones((40, 64), bool)


def test_a_recorded_run_is_held_against_the_right_pictures(played: tuple[str, Path, Path]) -> None:
    """Pairs, gaps and directions must be matched with their images: any mix-up changes these figures."""
    direction, source, recording = played
    reports = [report_of(message) for _, _, message in read_messages(recording, STATISTICS_TOPIC)]
    records = list(read_run(recording, PLAYED, reports, open_source(source), exact))
    assert [record.outcome for record in records] == [FIRST, PROCESSED, PROCESSED, DROPPED, PROCESSED, PROCESSED]
    found = [(record, record.info, record.fields) for record in records if record.fields is not None]
    assert [record.index for record, _, _ in found] == [1, 2, 4, 5]
    for item, info, fields in found:
        assert np.array_equal(fields.image2, picture(item.index)) and fields.direction == info.direction == direction
        assert item.measures["epe_px"] == pytest.approx(0.5, abs=1e-5) and info.stage_ms == {"solve": 20}
        assert item.measures["photometric"] < 0.75 * item.measures["photometric_still"]
        assert (info.stamp_ns, info.iterations, info.latency_ms) == (item.stamp_ns, 4, 30) and info.over_budget
    still = [item.measures["epe_still_px"] for item, _, _ in found]
    assert still == pytest.approx([SHIFT, SHIFT, 2 * SHIFT, SHIFT])
    assert [info.warm for _, info, _ in found] == [False, True, True, True]


def test_the_flow_of_a_region_is_held_against_that_part_of_the_images(
    played: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """With the node's parameter ``roi``, what was played is larger than the flow that came out."""
    _, source, recording = played
    around = ((4, 6), (8, 2))
    with BagWriter(tmp_path / "larger") as writer:
        for number, frame in enumerate(open_source(source).frames()):
            larger = np.pad(picture(number)[:, :, ::-1], (*around, (0, 0)))
            writer.write_frame("/image", frame_from_array(larger, frame.stamp_ns, frame.stamp_ns, "camera"))

    def of_larger(here: int, there: int) -> tuple[np.ndarray, np.ndarray]:
        flow, visible = exact(here, there)
        return np.pad(flow, (*around, (0, 0)), constant_values=99), np.pad(visible, around)

    reports = [report_of(message) for _, _, message in read_messages(recording, STATISTICS_TOPIC)]
    whole = list(read_run(recording, PLAYED, reports, open_source(source), exact))
    part = list(read_run(recording, PLAYED, reports, open_source(tmp_path / "larger"), of_larger, [8, 4, 64, 40]))
    told, told_of_whole = (repr([replace(one, fields=None) for one in records]) for records in (part, whole))
    assert told == told_of_whole


def test_some_pairs_of_a_recorded_run_are_solved_cold_and_in_the_other_direction(
    played: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is of the very pairs, at the stream's own scale and iterations; the node gives one direction."""
    monkeypatch.setattr("deq_flow_ros.evaluation.report.run_plots", lambda *_: [])
    direction, source, recording = played
    reports = [report_of(message) for _, _, message in read_messages(recording, STATISTICS_TOPIC)]
    records = list(read_run(recording, PLAYED, reports, open_source(source), exact))
    model = load_model("nano")
    settings = [SettingEntry(STREAMED, {"budget_ms": 90.0}), SettingEntry(COLD, {"budget_ms": None})]
    with ResultFolder(tmp_path / "out", {}) as folder:
        folder.begin()
    with ResultWriter(folder, settings) as writer:
        for setting, record in look_closer(records, model, direction, 2):
            writer.add(setting, record)
    metrics = writer.finish(RunInfo("live", {"description": "x"}, played_s=0.6))
    assert metrics["comparison"]["pairs"] == 2, "every second of the three warm ones"
    streamed, cold = metrics["settings"]
    assert streamed["fields_per_second"] == pytest.approx(4 / 0.6) and streamed["frames"]["dropped"] == 1
    assert cold["iterations"]["max"] == 4 and cold["warm_share"] == 0 and cold["deadline_miss_share"] is None
    assert [figures["measures"]["consistency_px"]["pairs"] for figures in (streamed, cold)] == [2, 2]
    assert streamed["measures"]["consistency_px"] != cold["measures"]["consistency_px"]
    estimator = FlowEstimator(model, tolerance_px=None, direction=direction, max_gap_ms=3.6e6)
    info, fields = records[2].info, records[2].fields
    assert info is not None and fields is not None
    again = solve_cold(estimator, records[2].index, info, fields)
    assert again is not None and again.fields is not None and again.info is not None
    assert again.index == records[2].index and again.info.iterations == 4
    assert again.fields.truth is fields.truth and not np.array_equal(again.fields.flow, fields.flow)


def test_what_could_not_be_played_of_a_video_has_rows_of_its_own(played: tuple[str, Path, Path]) -> None:
    """The node never heard of it: its rows stand in their places, up to the end of what was played."""
    _, source, recording = played
    reports = [report_of(message) for _, _, message in read_messages(recording, STATISTICS_TOPIC)]
    frames = list(open_source(source).frames())
    lost = [Frame.without_image("no key frame yet", stamp, stamp, "camera") for stamp in (-5, 250_000_000, 550_000_000)]
    video = SimpleNamespace(frames=lambda: iter([lost[0], *frames[:3], lost[1], *frames[3:], lost[2]]))
    found = list(read_run(recording, PLAYED, reports, video, exact))
    letters = "".join(record.outcome[0] for record in found)
    assert letters == "dfppddppd" and [record.index for record in found] == list(range(9))
    assert [found[index].stamp_ns for index in (0, 4, 8)] == [-5, 250_000_000, 550_000_000]
    assert found[0].reason == "no key frame yet"


def test_an_input_that_is_not_the_one_played_is_noticed(
    played: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors against the wrong pictures would look like a bad model."""
    _, source, recording = played
    reports = [report_of(message) for _, _, message in read_messages(recording, STATISTICS_TOPIC)]
    with BagWriter(tmp_path / "other") as writer:
        writer.write_frame("/image", frame_from_array(picture(0), 5, 5, "camera"))
    with pytest.raises(MediaError, match=r"holds no frame stamped [1-5]00000000 ns"):
        list(read_run(recording, PLAYED, reports, open_source(tmp_path / "other"), None))
    monkeypatch.setattr("deq_flow_ros.live.played.FLOW_TOPIC", "/none")
    assert all(record.fields is None for record in read_run(recording, PLAYED, reports, open_source(source), None))


def test_a_clock_that_was_set_back_does_not_mix_up_the_rows(played: tuple[str, Path, Path]) -> None:
    """Why: sorted by stamp, such a recording could not be held against its images."""
    _, source, recording = played
    stamps = (100, 133, 5, 5, 38)
    frames = [
        replace(frame, stamp_ns=stamp) for frame, stamp in zip(open_source(source).frames(), stamps, strict=False)
    ]
    reports = [FrameReport(one, {"outcome": "dropped", "reason": str(number)}) for number, one in enumerate(stamps)]
    video = SimpleNamespace(frames=lambda: iter(frames))
    for arrived in (reports, [reports[1], *reports[2:], reports[0]]):
        found = list(read_run(recording, stamps, arrived, video, None))
        assert [record.reason for record in found] == ["0", "1", "2", "3", "4"]
