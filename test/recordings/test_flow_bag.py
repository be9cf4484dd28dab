# SPDX-License-Identifier: Apache-2.0
"""The bag of the flow is one for every program that reads bags, and its account notices what is wrong."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from deq_flow_ros.recordings.bag_reader import read_messages
from deq_flow_ros.recordings.bags import (
    COLOR_TOPIC,
    FLOW_TOPIC,
    IMAGE_TOPIC,
    RESIDUAL_TOPIC,
    STATISTICS_TOPIC,
    UNCERTAINTY_TOPIC,
    FlowBag,
    FrameReport,
    take_account,
)

make_reader = pytest.importorskip("mcap.reader").make_reader
StreamReader = pytest.importorskip("mcap.stream_reader").StreamReader
DecoderFactory = pytest.importorskip("mcap_ros2.decoder").DecoderFactory

COUNT, STEP_NS, FIRST_NS = 5, 40_000_000, 10**18
FIELD_TOPICS = (FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, UNCERTAINTY_TOPIC)
COUNTS = {IMAGE_TOPIC: COUNT, STATISTICS_TOPIC: COUNT} | dict.fromkeys(FIELD_TOPICS, COUNT - 1)
IMAGE, ARRAY = "sensor_msgs/msg/Image", "diagnostic_msgs/msg/DiagnosticArray"


def flow(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(6, 8, 2)).astype(np.float32)


@pytest.fixture(scope="module", params=["mcap", "sqlite3"])
def bag(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first frame without flow, the others with forward flow, on the pixels of the frame before."""
    root = tmp_path_factory.mktemp("bag")
    (root / "nursery").mkdir()
    with FlowBag(root / "flow", root / "nursery", request.param) as written:
        for number in range(COUNT):
            stamp, image = FIRST_NS + number * STEP_NS, np.full((6, 8, 3), number, np.uint8)
            map_px = np.ones((6, 8), np.float32)
            fields = (flow(number), map_px, map_px, stamp - STEP_NS) if number else ()
            written.add(stamp, stamp + 7, "eye", {"outcome": "first", "number": str(number)}, image, *fields)
        assert not (root / "flow").exists(), "not before it can be opened"
    assert not any((root / "nursery").iterdir())
    return root / "flow"


def raw_messages(bag: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """(topic, type, time of recording, CDR) by the readers of the formats themselves."""
    for file in bag.glob("*.mcap"):
        with file.open("rb") as opened:
            for schema, channel, message in make_reader(opened, validate_crcs=True).iter_messages():
                assert schema is not None
                yield channel.topic, schema.name, message.log_time, message.data
    for file in bag.glob("*.db3"):
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
            yield from connection.execute(
                "SELECT name, type, timestamp, data FROM messages "
                "JOIN topics ON topics.id = topic_id ORDER BY timestamp"
            )


def test_it_says_of_itself_what_the_recorder_of_ros_does(bag: Path) -> None:
    """`ros2 bag` trusts metadata.yaml: files, times and counts (rosbag2_storage, yaml.hpp, version 9)."""
    about = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert about["version"] == 9 and about["relative_file_paths"] == [
        file.name for file in bag.iterdir() if file.name != "metadata.yaml"
    ]
    messages = list(raw_messages(bag))
    assert about["starting_time"]["nanoseconds_since_epoch"] == messages[0][2] == FIRST_NS + 7
    assert about["duration"]["nanoseconds"] == messages[-1][2] - messages[0][2] == (COUNT - 1) * STEP_NS
    assert about["message_count"] == len(messages) == sum(COUNTS.values())
    topics = {topic["topic_metadata"]["name"]: topic for topic in about["topics_with_message_count"]}
    assert {name: topic["message_count"] for name, topic in topics.items()} == COUNTS
    for name, topic in topics.items():
        kind = topic["topic_metadata"]
        assert kind["type"] == (ARRAY if name == STATISTICS_TOPIC else IMAGE) and kind["serialization_format"] == "cdr"
        assert kind["type_description_hash"].startswith("RIHS01_")


def test_every_message_is_what_ros_reads(bag: Path) -> None:
    """By the middleware's own deserialization, into the real message types."""
    pytest.importorskip("rclpy", reason="needs ROS 2")
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import Image

    counts: Counter[str] = Counter()
    for topic, kind, time_ns, data in raw_messages(bag):
        number = counts[topic] + (topic in FIELD_TOPICS)
        counts[topic] += 1
        message: Any = deserialize_message(data, {IMAGE: Image, ARRAY: DiagnosticArray}[kind])
        assert time_ns == FIRST_NS + 7 + number * STEP_NS
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        assert stamp == FIRST_NS + (number - (topic in FIELD_TOPICS)) * STEP_NS
        if topic == FLOW_TOPIC:
            assert (message.encoding, message.height, message.width, message.step) == ("32FC2", 6, 8, 64)
            assert bytes(message.data) == flow(number).tobytes() and message.header.frame_id == "eye"
        if topic == STATISTICS_TOPIC:
            assert {pair.key: pair.value for pair in message.status[0].values}["number"] == str(number)
    assert counts == COUNTS


def test_its_mcap_files_are_whole_and_explain_themselves(bag: Path) -> None:
    """Foxglove has no ROS: it reads by the profile and the definitions in the file. Every checksum has to fit."""
    for file in bag.glob("*.mcap"):
        with file.open("rb") as opened:
            kinds = Counter(type(record).__name__ for record in StreamReader(opened, validate_crcs=True).records)
        with file.open("rb") as opened:
            reader = make_reader(opened, validate_crcs=True, decoder_factories=[DecoderFactory()])
            summary = reader.get_summary()
            assert reader.get_header().profile == "ros2" and summary is not None and summary.statistics is not None
            assert all(b"MSG: std_msgs/Header" in schema.data for schema in summary.schemas.values())
            decoded = [
                (message.log_time, content)
                for _, channel, message, content in reader.iter_decoded_messages()
                if channel.topic == FLOW_TOPIC
            ]
            assert summary.statistics.message_count == kinds["Message"]
        for time_ns, content in decoded:
            assert bytes(content.data) == flow((time_ns - FIRST_NS) // STEP_NS).tobytes()


def test_the_bag_is_closed_whatever_happens(tmp_path: Path) -> None:
    """An error in mid-run must leave a bag that opens, and be heard itself."""
    (tmp_path / "nursery").mkdir()
    with pytest.raises(MemoryError), FlowBag(tmp_path / "flow", tmp_path / "nursery") as bag:
        bag.add(1, 1, "eye", {"outcome": "first"})
        raise MemoryError
    assert len(list(read_messages(tmp_path / "flow"))) == 1


PERIOD_NS = 100_000_000


def report(number: int, outcome: str = "processed", previous: int | None = None, **more: str) -> FrameReport:
    stamps = {"image1_stamp_ns": "", "image2_stamp_ns": str(number * PERIOD_NS)}
    if outcome == "processed":
        stamps["image1_stamp_ns"] = str((number - 1 if previous is None else previous) * PERIOD_NS)
    reason = {"first": "start", "dropped": "superseded by a newer frame"}.get(outcome, "")
    return FrameReport(
        number * PERIOD_NS, {"outcome": outcome, "reason": reason, "direction": "forward", **stamps, **more}
    )


def stamps(*numbers: int) -> list[int]:
    return [number * PERIOD_NS for number in numbers]


def test_a_complete_run_has_no_problems() -> None:
    """First, processed and dropped frames are all that was published; flow carries the previous image's stamp."""
    reports = [report(1, "first"), report(2), report(3, "dropped"), report(4, previous=2)]
    account = take_account(stamps(1, 2, 3, 4), reports, stamps(1, 2))
    assert account.problems == []
    assert account.outcomes == {"processed": 2, "first": 1, "dropped": 1}
    assert account.drop_reasons == {"superseded by a newer frame": 1}


@pytest.mark.parametrize(
    ("published", "reports", "flow", "problem"),
    [
        ((1, 2, 3), [report(1, "first"), report(2)], (1,), "1 frames published, but no report says"),
        ((1, 2), [report(1, "first"), report(2), report(2, "dropped")], (1,), "1 frames reported, but never published"),
        ((1, 2), [report(1, "first"), report(2)], (), "1 frames processed, but their flow was not recorded"),
        ((1, 2), [report(1, "first"), report(2)], (2,), "flow messages whose stamp is not that of"),
        ((1, 2), [report(1, "first"), report(2, "dropped", reason="")], (), "1 frames were dropped without a reason"),
        ((1,), [report(1, "lost")], (), r"expected the outcomes processed, first and dropped, got \['lost'\]"),
    ],
)
def test_whatever_does_not_add_up_is_named(
    published: tuple[int, ...], reports: list[FrameReport], flow: tuple[int, ...], problem: str
) -> None:
    """A frame that vanishes, appears twice, or whose flow is missing or wrongly stamped, must each be noticed."""
    account = take_account(stamps(*published), reports, stamps(*flow))
    assert any(re.search(problem, line) for line in account.problems), account.problems


def test_backward_flow_carries_the_current_stamp() -> None:
    """The header rule turns around with the direction."""
    backward = report(2, direction="backward")
    assert backward.flow_stamp_ns == 2 * PERIOD_NS and report(2).flow_stamp_ns == PERIOD_NS
    assert take_account(stamps(1, 2), [report(1, "first"), backward], stamps(2)).problems == []
