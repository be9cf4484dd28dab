# SPDX-License-Identifier: Apache-2.0
"""The bag of the flow is one for every program that reads bags, not only for the library that wrote it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from deq_flow_ros.evaluation.output_bag import (
    COLOR_TOPIC,
    FLOW_TOPIC,
    IMAGE_TOPIC,
    RESIDUAL_TOPIC,
    STATISTICS_TOPIC,
    FlowBag,
)
from deq_flow_ros.evaluation.results import FrameRecord, PairFields
from deq_flow_ros.evaluation.runner import Done, Shot
from deq_flow_ros.streaming import FlowInfo

make_reader = pytest.importorskip("mcap.reader").make_reader
StreamReader = pytest.importorskip("mcap.stream_reader").StreamReader
DecoderFactory = pytest.importorskip("mcap_ros2.decoder").DecoderFactory

COUNT, STEP_NS = 5, 40_000_000
COUNTS = {IMAGE_TOPIC: COUNT, STATISTICS_TOPIC: COUNT} | dict.fromkeys((FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC), 4)
IMAGE, ARRAY = "sensor_msgs/msg/Image", "diagnostic_msgs/msg/DiagnosticArray"


def flow(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(6, 8, 2)).astype(np.float32)


def done(number: int) -> Done:
    image = np.full((6, 8, 3), number, np.uint8)
    stamp = 10**18 + number * STEP_NS
    shot = Shot(number, number, stamp, stamp, stamp + 7, "eye", image)
    if number == 0:
        return Done(shot, FrameRecord(0, stamp, "first", "start"))
    info = FlowInfo(
        stamp, stamp - STEP_NS, "forward", iterations=3, stop_reason="converged", warm=True, residual_px=0.1,
        reset_reason=None, scale=1.0, stage_ms={"solve": 2.5}, latency_ms=3.0, budget_ms=None,
    )  # fmt: skip
    record = FrameRecord.of_flow(number, info, {"photometric": 1.5})
    return Done(shot, record, PairFields(image, image, flow(number), np.ones((6, 8), np.float32)), info)


@pytest.fixture(scope="module", params=["mcap", "sqlite3"])
def bag(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two parts, as an interrupted run leaves them."""
    written = FlowBag(tmp_path_factory.mktemp("bag") / "flow", request.param, images=True)
    for number in range(COUNT):
        written.add(done(number))
        if number in (2, COUNT - 1):
            written.close_part()
    return written.path


def raw_messages(bag: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """(topic, type, time of recording, CDR) by the readers of the formats themselves."""
    for file in sorted(bag.glob("*.mcap")):
        with file.open("rb") as opened:
            for schema, channel, message in make_reader(opened, validate_crcs=True).iter_messages():
                assert schema is not None
                yield channel.topic, schema.name, message.log_time, message.data
    for file in sorted(bag.glob("*.db3")):
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
            yield from connection.execute(
                "SELECT name, type, timestamp, data FROM messages "
                "JOIN topics ON topics.id = topic_id ORDER BY timestamp"
            )


def test_it_says_of_itself_what_the_recorder_of_ros_does(bag: Path) -> None:
    """`ros2 bag` trusts metadata.yaml: files in order, times and counts (rosbag2_storage, yaml.hpp, version 9)."""
    about = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert set(about) == {
        "version", "storage_identifier", "duration", "starting_time", "message_count", "topics_with_message_count",
        "compression_format", "compression_mode", "relative_file_paths", "files", "custom_data", "ros_distro",
    }  # fmt: skip
    assert about["version"] == 9 and sorted(about["relative_file_paths"]) == sorted(
        file.name for file in bag.iterdir() if file.name != "metadata.yaml"
    )
    assert [file["path"] for file in about["files"]] == about["relative_file_paths"] and len(about["files"]) == 2
    messages = list(raw_messages(bag))
    first, last = messages[0][2], messages[-1][2]
    assert (first, last) == (10**18 + 7, 10**18 + 7 + (COUNT - 1) * STEP_NS)
    assert about["starting_time"]["nanoseconds_since_epoch"] == first
    assert about["duration"]["nanoseconds"] == last - first
    assert about["message_count"] == len(messages) == sum(file["message_count"] for file in about["files"])
    topics = {topic["topic_metadata"]["name"]: topic for topic in about["topics_with_message_count"]}
    assert {name: topic["message_count"] for name, topic in topics.items()} == COUNTS
    for name, topic in topics.items():
        kind = topic["topic_metadata"]
        assert kind["type"] == (ARRAY if name == STATISTICS_TOPIC else IMAGE) and kind["serialization_format"] == "cdr"
        assert kind["type_description_hash"].startswith("RIHS01_") and kind["offered_qos_profiles"] == []


def test_every_message_is_what_ros_reads(bag: Path) -> None:
    """By the middleware's own deserialization, into the real message types."""
    pytest.importorskip("rclpy", reason="needs ROS 2")
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import Image

    counts: Counter[str] = Counter()
    for topic, kind, time_ns, data in raw_messages(bag):
        number = counts[topic] + (topic not in (IMAGE_TOPIC, STATISTICS_TOPIC))
        counts[topic] += 1
        message: Any = deserialize_message(data, {IMAGE: Image, ARRAY: DiagnosticArray}[kind])
        assert time_ns == 10**18 + 7 + number * STEP_NS
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        lives_on = number - (topic not in (IMAGE_TOPIC, STATISTICS_TOPIC))  # forward flow, on the earlier image
        assert stamp == 10**18 + lives_on * STEP_NS
        if topic == FLOW_TOPIC:
            assert (message.encoding, message.height, message.width, message.step) == ("32FC2", 6, 8, 64)
            assert bytes(message.data) == flow(number).tobytes() and message.header.frame_id == "eye"
        if topic == STATISTICS_TOPIC:
            values = {pair.key: pair.value for pair in message.status[0].values}
            assert values["outcome"] == ("first" if number == 0 else "processed")
            if number:
                assert values["image1_stamp_ns"] == str(stamp - STEP_NS) and values["direction"] == "forward"
                assert (values["stage_solve_ms"], values["warm"], values["photometric"]) == ("2.500", "true", "1.5")
    assert counts == COUNTS


def test_its_mcap_files_are_whole_and_explain_themselves(bag: Path) -> None:
    """Foxglove has no ROS: it reads by the profile and the definitions in the file. Every checksum has to fit."""
    for file in sorted(bag.glob("*.mcap")):
        with file.open("rb") as opened:
            kinds = Counter(type(record).__name__ for record in StreamReader(opened, validate_crcs=True).records)
        with file.open("rb") as opened:
            reader = make_reader(opened, validate_crcs=True, decoder_factories=[DecoderFactory()])
            summary = reader.get_summary()
            assert reader.get_header().profile == "ros2" and summary is not None and summary.statistics is not None
            assert {channel.message_encoding for channel in summary.channels.values()} == {"cdr"}
            for schema in summary.schemas.values():
                assert schema.encoding == "ros2msg" and b"MSG: std_msgs/Header" in schema.data
                assert b"MSG: builtin_interfaces/Time" in schema.data
            times = []
            for _, channel, message, decoded in reader.iter_decoded_messages():
                times.append(message.log_time)
                if channel.topic == FLOW_TOPIC:
                    number = (message.log_time - 10**18) // STEP_NS
                    assert bytes(decoded.data) == flow(number).tobytes()
            assert times == sorted(times) and len(times) == summary.statistics.message_count == kinds["Message"]
