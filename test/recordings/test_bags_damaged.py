# SPDX-License-Identifier: Apache-2.0
"""Bags as robots leave them: split, compressed, without metadata, cut short: what can be read is, the rest named."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from deq_flow_ros.recordings import Frame, MediaError, open_source
from deq_flow_ros.recordings.bag_reader import ZSTD_MAGIC, Bag, read_messages, zstd
from deq_flow_ros.recordings.bag_source import CAMERA_INFO, IMAGE
from deq_flow_ros.recordings.bags import BagWriter

COUNT, HEIGHT, WIDTH = 80, 64, 200
TOPIC = "/camera/image_raw"


def frame(number: int) -> Frame:
    """Noise, so that compression cannot make it vanish."""
    data = np.random.default_rng(number).integers(0, 256, HEIGHT * WIDTH * 3, np.uint8)
    stamp = 10**18 + number * 40_000_000
    return Frame(data, HEIGHT, WIDTH, WIDTH * 3, "rgb8", False, stamp, stamp, "eye")


def write(path: Path, numbers: range, storage: str = "mcap") -> Path:
    with BagWriter(path, storage) as writer:
        for number in numbers:
            writer.write_frame(TOPIC, frame(number))
    return path


def write_compressed(path: Path, mode: CompressionMode, storage: StoragePlugin) -> Path:
    types = get_typestore(Stores.ROS2_JAZZY)
    header, time = types.types["std_msgs/msg/Header"], types.types["builtin_interfaces/msg/Time"]
    writer = Writer(path, version=9, storage_plugin=storage)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection(TOPIC, "sensor_msgs/msg/Image", typestore=types)
        for number in range(COUNT):
            one = frame(number)
            stamp = time(*divmod(one.stamp_ns, 10**9))
            message = types.types["sensor_msgs/msg/Image"](
                header(stamp, "eye"), HEIGHT, WIDTH, "rgb8", 0, WIDTH * 3, one.data
            )
            writer.write(connection, one.record_ns, types.serialize_cdr(message, "sensor_msgs/msg/Image"))
    return path


def write_ros1(path: Path, compression: Ros1Writer.CompressionFormat | None = None) -> Path:
    types = get_typestore(Stores.ROS1_NOETIC)
    header, time = types.types["std_msgs/msg/Header"], types.types["builtin_interfaces/msg/Time"]
    writer = Ros1Writer(path)
    if compression is not None:
        writer.set_compression(compression)
    with writer:
        connection = writer.add_connection(TOPIC, "sensor_msgs/msg/Image", typestore=types)
        for number in range(COUNT):
            one = frame(number)
            message = types.types["sensor_msgs/msg/Image"](
                header(number, time(*divmod(one.stamp_ns, 10**9)), "eye"), HEIGHT, WIDTH, "rgb8", 0, WIDTH * 3, one.data
            )
            writer.write(connection, one.record_ns, types.serialize_ros1(message, "sensor_msgs/msg/Image"))
    return path


def split(folder: Path, storage: str = "mcap", parts: int = 4) -> Path:
    """A recording in parts, as `ros2 bag record --max-bag-size` leaves it."""
    folder.mkdir()
    size = COUNT // parts
    names = []
    for number in range(parts):
        part = write(folder.parent / f"{folder.name}_{number}", range(size * number, size * (number + 1)), storage)
        data = next(file for file in part.iterdir() if file.name != "metadata.yaml")
        names.append(shutil.move(data, folder / data.name).name)
        metadata = yaml.safe_load((part / "metadata.yaml").read_text())
    metadata["rosbag2_bagfile_information"]["relative_file_paths"] = names
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    return folder


def numbers_of(path: Path) -> tuple[list[int], list[str]]:
    """Which frames are read, each compared bit by bit, and what is said to be wrong."""
    source = open_source(path)
    found = []
    for one in source.frames():
        number = round((one.stamp_ns - 10**18) / 40_000_000)
        assert np.array_equal(one.data, frame(number).data) and one.record_ns == frame(number).record_ns
        found.append(number)
    return found, source.skipped


@pytest.mark.parametrize("mode", [CompressionMode.FILE, CompressionMode.MESSAGE, CompressionMode.STORAGE])
def test_compressed_recordings_are_read(tmp_path: Path, mode: CompressionMode) -> None:
    """Whole files, single messages, chunks of MCAP: recorders offer all three, and robots use them to save disk."""
    bag = write_compressed(tmp_path / "bag", mode, StoragePlugin.MCAP)
    assert numbers_of(bag) == (list(range(COUNT)), [])
    (bag / "metadata.yaml").unlink()
    assert numbers_of(bag) == (list(range(COUNT)), [])


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("metadata", ["kept", "none", "broken", "foreign"])
def test_split_recordings_are_one_stream_whatever_their_metadata(tmp_path: Path, storage: str, metadata: str) -> None:
    """A recorder that is killed leaves none; editors and newer versions leave odd ones; the data files are enough."""
    bag = split(tmp_path / "drive", storage)
    file = bag / "metadata.yaml"
    if metadata == "none":
        file.unlink()
    elif metadata != "kept":
        file.write_text({"broken": "rosbag2: [", "foreign": "rosbag2_bagfile_information: {version: 99}"}[metadata])
    assert numbers_of(bag) == (list(range(COUNT)), [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rosbag2_bagfile_information:\n", "no list rosbag2_bagfile_information: relative_file_paths"),
        ("a: [", "line 1"),
    ],
)
def test_metadata_without_use_is_told_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, said: str
) -> None:
    bag = write(tmp_path / "bag", range(3))
    (bag / "metadata.yaml").write_text(text)
    assert len(list(open_source(bag).frames())) == 3
    assert said in caplog.text and "Error(" not in caplog.text


@pytest.mark.parametrize("metadata", [False, True])
def test_parts_come_in_the_order_of_their_numbers(tmp_path: Path, metadata: bool) -> None:
    """Tools list part 10 before part 2 in the metadata; since 2026, rosbag2 puts number and time around the name."""
    bag = split(tmp_path / "drive", parts=16)
    file = bag / "metadata.yaml"
    if metadata:
        listed = yaml.safe_load(file.read_text())
        listed["rosbag2_bagfile_information"]["relative_file_paths"].sort()
        file.write_text(yaml.safe_dump(listed))
    else:
        file.unlink()
        for number in range(16):
            new_name = f"{number}_drive_2026_06_30-17_{number:02d}_09.mcap"
            (bag / f"drive_{number}.mcap").rename(bag / new_name)
    assert numbers_of(bag) == (list(range(COUNT)), [])
    if not metadata:
        (bag / "9_drive_2026_06_30-17_09_09.mcap").unlink()
        assert [text for text in numbers_of(bag)[1] if "the parts drive_9 " in text]


def test_a_missing_part_is_named_and_costs_no_other(tmp_path: Path) -> None:
    """Copied without one file: three quarters of a recording are worth more than none."""
    bag = split(tmp_path / "drive")
    (bag / "drive_1.mcap").unlink()
    found, problems = numbers_of(bag)
    assert found == [*range(20), *range(40, 80)]
    assert len(problems) == 1 and "drive_1.mcap, which metadata.yaml names, is missing" in problems[0]


@pytest.mark.parametrize("kind", ["mcap", "sqlite3", "ros1", "chunks"])
def test_a_recording_that_was_cut_short_is_read_to_where_it_breaks_off(tmp_path: Path, kind: str) -> None:
    """A robot that lost power: everything that reached the disk counts, and the loss is named."""
    if kind == "ros1":
        file = write_ros1(tmp_path / "old.bag")
    elif kind == "chunks":
        bag = write_compressed(tmp_path / "bag", CompressionMode.STORAGE, StoragePlugin.MCAP)
        file = bag / "bag.mcap"
    else:
        bag = write(tmp_path / "bag", range(COUNT), kind)
        file = next(child for child in bag.iterdir() if child.name != "metadata.yaml")
    if kind == "sqlite3":
        with closing(sqlite3.connect(file)) as database:
            database.execute("analyze")  # rosbags has SQLite do so, from 3.46 on; what it appends is cut off here
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 7 // 10])
    found, problems = numbers_of(file)
    assert found == list(range(len(found))) and len(found) >= 0.55 * COUNT
    assert len(problems) == 1 and f"{file} is damaged" in problems[0]


def test_a_part_has_the_name_that_the_metadata_gives_it(tmp_path: Path) -> None:
    """Whoever gives a data file another name, and tells the metadata so, has not lost it."""
    bag = split(tmp_path / "drive")
    (bag / "drive_1.mcap").rename(bag / "drive_1.saved")
    file = bag / "metadata.yaml"
    file.write_text(file.read_text().replace("drive_1.mcap", "drive_1.saved"))
    assert numbers_of(bag) == (list(range(COUNT)), [])


def test_a_damaged_chunk_costs_itself_only(tmp_path: Path) -> None:
    """One bad sector in the middle: the frames before and after it are still there."""
    bag = write_compressed(tmp_path / "bag", CompressionMode.STORAGE, StoragePlugin.MCAP)
    data = bytearray((bag / "bag.mcap").read_bytes())
    chunk = data.index(ZSTD_MAGIC, data.index(ZSTD_MAGIC) + 4)  # the second one
    data[chunk : chunk + 64] = bytes(64)
    (bag / "bag.mcap").write_bytes(data)
    found, problems = numbers_of(bag)
    assert found == sorted(set(found)) and found[0] == 0
    assert found[-1] == COUNT - 1 and 0 < COUNT - len(found) <= 30
    assert len(problems) == 1 and "a chunk of" in problems[0]


def test_a_damaged_beginning_leaves_what_comes_after_it(tmp_path: Path) -> None:
    """What the topics are is said once at the beginning, and again at the end."""
    bag = write_compressed(tmp_path / "bag", CompressionMode.STORAGE, StoragePlugin.MCAP)
    data = bytearray((bag / "bag.mcap").read_bytes())
    chunk = data.index(ZSTD_MAGIC)
    data[chunk : chunk + 64] = bytes(64)
    (bag / "bag.mcap").write_bytes(data)
    found, problems = numbers_of(bag)
    assert found[-1] == COUNT - 1 and 30 < len(found) < COUNT and "a chunk of" in problems[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_message_that_cannot_be_decoded_costs_itself_only(
    tmp_path: Path, packed: bool, storage: str, cut: bool
) -> None:
    """Written by a driver that crashed, or half of a compressed one: named, in an intact file and in a damaged one."""
    whole = write(tmp_path / "whole", range(20), storage)
    with BagWriter(tmp_path / "bag", storage) as writer:
        for recorded in Bag(whole).messages():
            raw = zstd.compress(recorded.raw()) if packed else recorded.raw()
            broken = recorded.time_ns == frame(5).record_ns
            writer.write_raw(TOPIC, IMAGE, raw[: len(raw) // 2] if broken else raw, recorded.time_ns)
    bag = next(child for child in (tmp_path / "bag").iterdir() if child.name != "metadata.yaml")
    if cut:
        bag.write_bytes(bag.read_bytes()[: bag.stat().st_size * 9 // 10])
    found, problems = numbers_of(bag)
    assert found[:7] == [0, 1, 2, 3, 4, 6, 7] and found == sorted(set(found)) and (len(found) < 19) == cut
    named = f"the message ({IMAGE}) on {TOPIC} that was recorded at {frame(5).record_ns} ns cannot be decoded"
    assert len(problems) == 1 + cut and sum(named in problem for problem in problems) == 1


def test_what_lies_beside_the_images_may_be_undecodable_too(tmp_path: Path) -> None:
    """A broken calibration, or another camera whose first image is broken, is no reason to read nothing."""
    with BagWriter(tmp_path / "bag") as writer:
        writer.write_raw("/camera/camera_info", CAMERA_INFO, bytes([0, 1, 0, 0]), 0)
        writer.write_raw("/broken", IMAGE, bytes([0, 1, 0, 0]), 0)
        writer.write_frame(TOPIC, frame(0))
    found, problems = numbers_of(tmp_path / "bag")
    assert found == [0] and len(problems) == 1 and "on /camera/camera_info that was recorded at 0 ns" in problems[0]
    with pytest.raises(MediaError, match=r"none of the 1 images of bag bag: /broken .* can be read: the message"):
        list(open_source(tmp_path / "bag", "/broken").frames())
    with pytest.raises(MediaError, match="on /broken that was recorded at 0 ns cannot be decoded"):
        list(read_messages(tmp_path / "bag", "/broken"))


def test_a_damaged_name_of_a_topic_in_sqlite_is_named(tmp_path: Path) -> None:
    """SQLite gives text as it lies there, and Python cannot decode all of it."""
    file = next(write(tmp_path / "bag", range(2), "sqlite3").glob("*.db3"))
    with closing(sqlite3.connect(file)) as database:
        database.execute("update topics set name = cast(x'2f63bf' as text)")
        database.commit()
    with pytest.raises(MediaError, match=r"bag\.db3 is damaged: SQLite cannot read it.* decode byte 0xbf"):
        open_source(file)


def test_an_unknown_compression_is_named(tmp_path: Path) -> None:
    """Guessing would read garbage."""
    bag = write(tmp_path / "bag", range(2))
    text = (bag / "metadata.yaml").read_text().replace("compression_format: ''", "compression_format: fancy")
    (bag / "metadata.yaml").write_text(text)
    with pytest.raises(MediaError, match=r"bag is compressed by 'fancy'; expected zstd or none"):
        open_source(bag)


def test_several_recordings_are_not_taken_for_one(tmp_path: Path) -> None:
    """Two drives in a folder are no stream."""
    folder = tmp_path / "drives"
    folder.mkdir()
    for name in ("north", "south"):
        shutil.move(write(tmp_path / name, range(2)) / f"{name}.mcap", folder)
    with pytest.raises(MediaError, match=r"holds several recordings \(north, south\)"):
        open_source(folder)
