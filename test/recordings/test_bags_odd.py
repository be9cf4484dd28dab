# SPDX-License-Identifier: Apache-2.0
"""Recordings that are whole but unusual: what is in them is read, and none of them is called damaged."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.typesys import Stores, get_typestore

from deq_flow_ros.recordings import Frame, MediaError, open_source
from deq_flow_ros.recordings.bag_reader import Bag
from deq_flow_ros.recordings.bags import BagWriter
from deq_flow_ros.recordings.files import missing_parts

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

McapWriter = pytest.importorskip("mcap.writer").Writer

COUNT, HEIGHT, WIDTH, FIRST_NS, STEP_NS = 6, 12, 16, 1_700_000_000 * 10**9, 40_000_000
TOPIC = "/camera/image_raw"
JAZZY, NOETIC = get_typestore(Stores.ROS2_JAZZY), get_typestore(Stores.ROS1_NOETIC)


def frame(number: int) -> Frame:
    data = np.random.default_rng(number).integers(0, 256, HEIGHT * WIDTH * 3, np.uint8)
    stamp = FIRST_NS + number * STEP_NS
    return Frame(data, HEIGHT, WIDTH, WIDTH * 3, "rgb8", False, stamp, stamp, "eye")


def write(path: Path, storage: str = "mcap") -> Path:
    """A bag of ``COUNT`` frames; returns its data file."""
    with BagWriter(path, storage) as writer:
        for number in range(COUNT):
            writer.write_frame(TOPIC, frame(number))
    return next(child for child in path.iterdir() if child.name != "metadata.yaml")


def read(path: Path) -> tuple[int, int, list[str]]:
    """Number of frames as the recording claims it, number of right ones, and what is said to be wrong."""
    source = open_source(path)
    right = [np.array_equal(one.data, frame(number).data) for number, one in enumerate(source.frames())]
    assert all(right)
    return source.count or 0, len(right), source.skipped


WHOLE = (COUNT, COUNT, [])


@pytest.mark.parametrize("kept", [0, 2])
def test_the_last_messages_of_a_killed_recorder_are_read(tmp_path: Path, kept: int) -> None:
    """SQLite writes into a log beside the file first. A killed recorder leaves its last seconds there, or all."""
    tables = write(tmp_path / "bag", "sqlite3")
    live, killed = tmp_path / "live.db3", tmp_path / "killed"
    killed.mkdir()
    database = sqlite3.connect(live)
    for pragma in ("journal_mode=wal", "wal_autocheckpoint=0"):
        database.execute(f"pragma {pragma}")
    database.execute("attach ? as done", (str(tables),))
    for (command,) in database.execute(
        "select sql from done.sqlite_master where tbl_name in ('topics', 'messages') and sql is not null"
    ).fetchall():
        database.execute(command)
    database.execute("insert into topics select * from done.topics")
    database.execute("insert into messages select * from done.messages where id <= ?", (kept,))
    database.commit()
    if kept:
        database.execute("pragma main.wal_checkpoint(truncate)")
    database.execute("insert into messages select * from done.messages where id > ?", (kept,))
    database.commit()
    for file in (live, Path(f"{live}-wal")):
        shutil.copy(file, killed)
    database.close()
    before = {file.name: file.read_bytes() for file in killed.iterdir()}
    assert read(killed) == read(killed / "live.db3") == WHOLE
    assert {file.name: file.read_bytes() for file in killed.iterdir()} == before, "a recording is only read"
    (killed / "live.db3-wal").unlink()
    if kept:
        assert read(killed)[1] == kept
    else:
        with pytest.raises(MediaError, match=r"file of the same name with -wal at its end missing"):
            read(killed)


@pytest.mark.parametrize("name", ["run #3", "what?x=1", "50%25 off", "größe ß"])
def test_names_with_signs_that_mean_something_in_an_address_are_read(tmp_path: Path, name: str) -> None:
    """SQLite may take file names as addresses, where "#" and "?" end them."""
    assert read(write(tmp_path / "bag", "sqlite3").parent.rename(tmp_path / name)) == WHOLE
    assert read(write(tmp_path / "bag", "mcap").parent.rename(tmp_path / f"{name} 2")) == WHOLE
    if name.isascii():
        with pytest.raises(MediaError, match=r"cannot write an SQLite bag to .*, or the storage mcap"):
            write(tmp_path / name, "sqlite3")


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_clock_that_was_set_back_before_the_first_image_hides_none(tmp_path: Path, storage: str) -> None:
    """Times of recording before that of the first image are no times before its beginning."""
    stream = [replace(frame(n), record_ns=FIRST_NS + n * STEP_NS - (n > 2) * 3600 * 10**9) for n in range(COUNT)]
    with BagWriter(tmp_path / "bag", storage) as writer:
        for one in stream:
            writer.write_frame(TOPIC, one)
    source = open_source(tmp_path / "bag")
    stamps = [one.stamp_ns for one in source.frames()]
    assert stamps == [FIRST_NS + n * STEP_NS for n in range(COUNT)] and source.skipped == []
    assert len(list(open_source(tmp_path / "bag", start_s=0.1).frames())) == COUNT - 3


@pytest.mark.parametrize("kind", ["recorded at once", "sent twice", "without stamps", "in another unit"])
def test_the_rate_of_a_recording_is_that_of_its_images(tmp_path: Path, kind: str) -> None:
    """What is a gap, and how long a replay lasts, hang on it; a message sent twice made it 1,000,000,000 Hz."""
    with BagWriter(tmp_path / "bag") as writer:
        for n in range(COUNT):
            one = frame(n)
            if kind == "recorded at once":
                one = replace(one, record_ns=FIRST_NS)
            if kind == "without stamps":
                one = replace(one, stamp_ns=0)
            if kind == "in another unit":
                one = replace(one, stamp_ns=FIRST_NS + 1000 * n * STEP_NS)
            writer.write_frame(TOPIC, one)
            if kind == "sent twice":
                writer.write_frame(TOPIC, replace(one, record_ns=one.record_ns + 1))
    source = open_source(tmp_path / "bag")
    assert source.nominal_period_ns == STEP_NS
    assert ("advance 1,000 times faster than the recording" in source.odd_stamps) == (kind == "in another unit")
    due = [one.record_ns - FIRST_NS for one in source.frames()]
    assert due[:: 2 if kind == "sent twice" else 1] == [n * STEP_NS for n in range(COUNT)]


@pytest.mark.parametrize("kind", ["a stamp of zero", "a stamp far ahead", "a clock set while recording"])
def test_a_single_odd_time_is_not_called_a_wrong_unit(tmp_path: Path, kind: str) -> None:
    """One step of 53 years makes the mean of all steps a million times longer."""
    with BagWriter(tmp_path / "bag") as writer:
        for n in range(COUNT):
            one = frame(n)
            if kind == "a clock set while recording":
                one = replace(one, record_ns=one.record_ns - (FIRST_NS if n < 3 else 0))
            elif n == 2:
                one = replace(one, stamp_ns=0 if kind == "a stamp of zero" else FIRST_NS + 2**28 * 10**9)
            writer.write_frame(TOPIC, one)
    source = open_source(tmp_path / "bag")
    assert source.odd_stamps == "" and source.nominal_period_ns == STEP_NS


def test_words_of_quality_of_service_that_nobody_knows_cost_nothing(tmp_path: Path) -> None:
    """Newer and patched recorders write others; they say nothing of the images."""
    file = write(tmp_path / "bag", "sqlite3")
    database = sqlite3.connect(file)
    database.execute("update topics set offered_qos_profiles='- history: keep_some\n  depth: x\n'")
    database.commit()
    database.close()
    assert read(file) == WHOLE


BESIDE = {
    "a definition that cannot be parsed": ("my_msgs/msg/Odd", "ros2msg", b"Definition of my_msgs/Odd", "cdr"),
    "events of a service": ("my_srvs/srv/Do_Event", "ros2msg", b"service_msgs/ServiceEventInfo info", "cdr"),
    "JSON": ("Thing", "jsonschema", b'{"type":"object"}', "json"),
    "protobuf": ("foxglove.Log", "protobuf", b"\x0a\x02hi", "protobuf"),
    "OMG IDL": ("my_msgs/msg/Odd", "omgidl", b"struct Odd { long x; };", "cdr"),
    "data without a description": None,
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("qos", ["", "- history: keep_some\n"])
def test_other_things_than_ros_messages_beside_the_images_are_no_damage(tmp_path: Path, beside: str, qos: str) -> None:
    """Foxglove's tools, service introspection and own programs write them into the same file."""
    text, _ = JAZZY.generate_msgdef("sensor_msgs/msg/Image", ros_version=2)
    with (tmp_path / "mixed.mcap").open("wb") as file:
        writer = McapWriter(file)
        writer.start("ros2", "test")
        schema = writer.register_schema("sensor_msgs/msg/Image", "ros2msg", text.encode())
        images = writer.register_channel(TOPIC, "cdr", schema, {"offered_qos_profiles": qos})
        what = BESIDE[beside]
        number = writer.register_schema(*what[:3]) if what else 0
        other = writer.register_channel("/other", what[3] if what else "raw", number)
        for recorded in Bag(write(tmp_path / "bag")).messages():
            writer.add_message(images, recorded.time_ns, recorded.raw(), recorded.time_ns)
            writer.add_message(other, recorded.time_ns, b"{}", recorded.time_ns)
        writer.finish()
    assert read(tmp_path / "mixed.mcap") == WHOLE


@pytest.mark.parametrize("compressed", [False, True])
def test_ros_1_messages_in_mcap_are_read(tmp_path: Path, compressed: bool) -> None:
    """`mcap convert` keeps the messages of a ROS 1 bag in their own form."""
    name = "sensor_msgs/msg/CompressedImage" if compressed else "sensor_msgs/msg/Image"
    text, _ = NOETIC.generate_msgdef(name, ros_version=1)
    header, time = NOETIC.types["std_msgs/msg/Header"], NOETIC.types["builtin_interfaces/msg/Time"]
    with (tmp_path / "old.mcap").open("wb") as file:
        writer = McapWriter(file)
        writer.start("ros1", "test")
        schema = writer.register_schema(name.replace("/msg/", "/"), "ros1msg", text.encode())
        channel = writer.register_channel(TOPIC, "ros1", schema)
        for number in range(COUNT):
            one = frame(number)
            head = header(number, time(*divmod(one.stamp_ns, 10**9)), "eye")
            picture = cv2.imencode(".png", one.data.reshape(HEIGHT, WIDTH, 3)[..., ::-1])[1].ravel()
            content = ("png", picture) if compressed else (HEIGHT, WIDTH, "rgb8", 0, WIDTH * 3, one.data)
            message = NOETIC.types[name](head, *content)
            writer.add_message(channel, one.record_ns, bytes(NOETIC.serialize_ros1(message, name)), one.record_ns)
        writer.finish()
    assert read(tmp_path / "old.mcap") == WHOLE


def test_images_that_are_no_ros_messages_are_named_as_such(tmp_path: Path) -> None:
    """Not "damaged": whoever reads that would look for a fault of the disk."""
    with (tmp_path / "foxglove.mcap").open("wb") as file:
        writer = McapWriter(file)
        writer.start("", "test")
        schema = writer.register_schema("foxglove.CompressedImage", "protobuf", b"\x0a\x04test")
        channel = writer.register_channel("/front/image", "protobuf", schema)
        writer.add_message(channel, FIRST_NS, b"\x0a\x00", FIRST_NS)
        writer.finish()
    found = r"no images .*: /front/image \(foxglove.CompressedImage in protobuf, 1 messages\); only messages of ROS"
    with pytest.raises(MediaError, match=found):
        open_source(tmp_path / "foxglove.mcap")


def test_what_macos_puts_beside_a_copy_is_left_out(tmp_path: Path) -> None:
    """Finder writes ``._name`` with attributes beside each file on a foreign disk; it is neither image nor bag."""
    file = write(tmp_path / "bag")
    (file.parent / "metadata.yaml").unlink()
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        cv2.imwrite(str(images / f"{number}.png"), np.full((8, 8), number, np.uint8))
        (images / f"._{number}.png").write_bytes(b"\0\5\x16\7" + bytes(60))
    (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7" + bytes(60))
    assert read(file.parent) == WHOLE
    source = open_source(images)
    assert source.count == 3 and len(list(source.frames())) == 3 and source.skipped == []


def test_signs_that_look_like_digits_are_no_numbers(tmp_path: Path) -> None:
    """Superscripts count as digits in Unicode, and have no value."""
    for number in (10, 9):
        cv2.imwrite(str(tmp_path / f"1²{number}.png"), np.full((8, 8), number, np.uint8))
    assert [int(one.data[0]) for one in open_source(tmp_path).frames()] == [9, 10]


def test_a_topic_with_messages_of_two_types_gives_its_images(tmp_path: Path) -> None:
    """Two programs may disagree about the type of a topic; then a bag has messages of both."""
    text, _ = JAZZY.generate_msgdef("sensor_msgs/msg/Image", ros_version=2)
    with (tmp_path / "two.mcap").open("wb") as file:
        writer = McapWriter(file)
        writer.start("ros2", "test")
        other = writer.register_schema("std_msgs/msg/String", "ros2msg", b"string data")
        words = writer.register_channel(TOPIC, "cdr", other)
        schema = writer.register_schema("sensor_msgs/msg/Image", "ros2msg", text.encode())
        images = writer.register_channel(TOPIC, "cdr", schema)
        for recorded in Bag(write(tmp_path / "bag")).messages():
            writer.add_message(words, recorded.time_ns, b"\0\1\0\0\2\0\0\0a\0", recorded.time_ns)
            writer.add_message(images, recorded.time_ns, recorded.raw(), recorded.time_ns)
        writer.finish()
    assert read(tmp_path / "two.mcap") == WHOLE
    assert read((tmp_path / "two.mcap").rename(tmp_path / "renamed")) == WHOLE, "its content says that it is a bag"


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_parts_of_a_recording_are_named_without_its_metadata(tmp_path: Path, lost: int) -> None:
    """What a copy has left out is known by the numbers of the other parts."""
    folder = tmp_path / "drive"
    folder.mkdir()
    for number in range(3):
        if number != lost:
            shutil.copy(write(tmp_path / f"{number}"), folder / f"drive_{number}.mcap")
    source = open_source(folder)
    assert source.skipped == [f"the parts drive_{lost} of {folder} are missing, as the numbers of the others say"]
    for dated in (("d_2024_05_12.mcap",), ("d_2024_05_12.mcap", "d_2024_05_x.mcap"), ("a.mcap",)):
        assert missing_parts(dated, "d") == []


def test_a_file_that_cannot_be_unpacked_is_said_to_be_that(tmp_path: Path) -> None:
    """Not "empty"; and one that only has the name of a compressed file is read as it is."""
    plain = write(tmp_path / "bag")
    assert read(Path(shutil.copy(plain, tmp_path / "plain.mcap.zstd"))) == WHOLE
    packed = zstd.compress(plain.read_bytes())
    (tmp_path / "cut.mcap.zstd").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(MediaError, match=r"cut.mcap.zstd is damaged: it cannot be unpacked to its end \(.*\)$"):
        open_source(tmp_path / "cut.mcap.zstd")
