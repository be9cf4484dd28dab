# SPDX-License-Identifier: Apache-2.0
"""Image sources: every kind of input yields frames with its own stamps, and what cannot be read is named."""

import os
import sqlite3
from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluation_inputs import add_compressed
from PIL import Image
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.typesys import Stores, get_typestore

from deq_flow_ros.imaging.encodings import Levels, eight_bits
from deq_flow_ros.recordings import Frame, MediaError, open_source
from deq_flow_ros.recordings.bag_source import CAMERA_INFO
from deq_flow_ros.recordings.bags import BagWriter

PERIOD_NS = 40_000_000


def picture(number: int, height: int = 24, width: int = 32) -> np.ndarray:
    image = np.full((height, width, 3), 40, np.uint8)
    cv2.rectangle(image, (2 * number, 4), (2 * number + 8, 14), (30, 200, 240), -1)
    return image


def raw_frame(number: int, encoding: str = "bgr8", padding: int = 0) -> Frame:
    image = picture(number)
    rows = np.pad(image.reshape(24, 96), ((0, 0), (0, padding)))
    stamp = 1_700_000_000_000_000_000 + number * PERIOD_NS
    return Frame(rows.ravel(), 24, 32, 96 + padding, encoding, False, stamp, stamp + 5_000_000, "eye")


def write_bag(path: Path, storage: str = "mcap", topic: str = "/camera/image_raw", padding: int = 0) -> Path:
    with BagWriter(path, storage) as writer:
        writer.write_diagnostics("/status", "engine", {"speed": "3"}, 7, 7)
        for number in range(4):
            writer.write_frame(topic, raw_frame(number, padding=padding))
    return path


def same(one: Frame, two: Frame) -> bool:
    fields = ("height", "width", "step", "encoding", "is_bigendian", "stamp_ns", "record_ns", "frame_id")
    return all(getattr(one, name) == getattr(two, name) for name in fields) and np.array_equal(one.data, two.data)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_rosbag2_frames_come_back_as_recorded(tmp_path: Path, storage: str) -> None:
    """Both storages, as directory and as bare data file, must keep bytes, padding, stamps and times."""
    bag = write_bag(tmp_path / "bag", storage, padding=5)
    for path in (bag, next(bag.glob("*.db3" if storage == "sqlite3" else "*.mcap"))):
        source = open_source(path)
        assert (source.kind, source.count, source.live) == ("bag", 4, False)
        assert source.nominal_period_ns == PERIOD_NS
        assert all(same(frame, raw_frame(number, padding=5)) for number, frame in enumerate(source.frames()))
        assert len(list(source.frames())) == 4, "a second pass starts over"


def test_ros1_bag_is_read(tmp_path: Path) -> None:
    """ROS 1 recordings are still what most public data sets come as."""
    types = get_typestore(Stores.ROS1_NOETIC)
    header, time = types.types["std_msgs/msg/Header"], types.types["builtin_interfaces/msg/Time"]
    with Ros1Writer(tmp_path / "old.bag") as writer:
        connection = writer.add_connection("/cam", "sensor_msgs/msg/Image", typestore=types)
        for number in range(3):
            frame = raw_frame(number)
            stamp = time(*divmod(frame.stamp_ns, 10**9))
            message = types.types["sensor_msgs/msg/Image"](
                header(number, stamp, "eye"), 24, 32, "bgr8", 0, 96, frame.data.copy()
            )
            writer.write(connection, frame.record_ns, types.serialize_ros1(message, "sensor_msgs/msg/Image"))
        roi = types.types["sensor_msgs/msg/RegionOfInterest"](1, 2, 16, 20, False)
        matrices = (np.zeros(5), np.arange(9.0), np.eye(3).ravel(), np.zeros(12))
        info = types.types[CAMERA_INFO](header(0, stamp, "eye"), 24, 32, "plumb_bob", *matrices, 0, 0, roi)
        connection = writer.add_connection("/camera_info", CAMERA_INFO, typestore=types)
        writer.write(connection, frame.record_ns, types.serialize_ros1(info, CAMERA_INFO))
    source = open_source(tmp_path / "old.bag")
    assert source.calibration is not None and source.calibration["k"] == list(range(9))
    assert source.calibration["roi"]["width"] == 20, "fields of nested messages too"
    frames = list(source.frames())
    assert len(frames) == 3 and all(same(frame, raw_frame(number)) for number, frame in enumerate(frames))
    assert source.skipped == ["the camera_info beside /cam describes images of 20x16 px, these are 32x24"]


def test_compressed_images_are_decoded_and_broken_ones_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One broken JPEG in a recording must not end the replay, nor vanish silently."""
    with BagWriter(tmp_path / "bag") as writer:
        for number in range(3):
            data = cv2.imencode(".png", picture(number))[1].tobytes()
            add_compressed(writer, "/c", data if number != 1 else data[:20], number)
    source = open_source(tmp_path / "bag")
    frames = list(source.frames())
    assert [frame.stamp_ns for frame in frames] == [0, 2]
    assert frames[1].encoding == "rgb8" and np.array_equal(frames[1].data.reshape(24, 32, 3)[..., ::-1], picture(2))
    assert len(source.skipped) == 1 and "stamped 1" in source.skipped[0]


def test_compressed_images_of_16_bits_share_their_range(tmp_path: Path) -> None:
    """A range of its own for each image would make a scene brighter and darker that is not, unlike raw images."""
    ramp = np.arange(0, 24 * 32, dtype=np.uint16).reshape(24, 32)
    with BagWriter(tmp_path / "bag") as writer:
        for number, counts in enumerate((ramp, ramp // 2 + 100)):
            add_compressed(writer, "/c", cv2.imencode(".png", counts)[1].tobytes(), number)
    levels = Levels()
    for frame, counts in zip(open_source(tmp_path / "bag").frames(), (ramp, ramp // 2 + 100), strict=True):
        assert np.array_equal(frame.data.reshape(24, 32, 3)[..., 0], eight_bits(counts, levels))


def test_bag_topic_is_found_where_there_is_one_and_listed_where_there_are_several(tmp_path: Path) -> None:
    """A guess could evaluate the wrong camera unnoticed; what is no picture (depth, flow) is no candidate."""
    depth = Frame(np.zeros(24 * 32 * 4, np.uint8), 24, 32, 128, "32FC1", False, 1, 1, "eye")
    with BagWriter(tmp_path / "bag") as writer:
        writer.write_frame("/depth", depth)
        writer.write_frame("/left", raw_frame(1))
        writer.write_diagnostics("/status", "engine", {}, 0, 0)
    assert same(next(iter(open_source(tmp_path / "bag").frames())), raw_frame(1))
    with BagWriter(tmp_path / "two") as writer:
        for topic in ("/left", "/right"):
            writer.write_frame(topic, raw_frame(1 if topic == "/left" else 2))
        writer.write_diagnostics("/status", "engine", {}, 0, 0)
    listed = r"choose one with --topic: /left \(sensor_msgs/msg/Image, 1 images, 32x24 bgr8\); /right"
    with pytest.raises(MediaError, match=listed):
        open_source(tmp_path / "two")
    assert same(next(iter(open_source(tmp_path / "two", topic="/right").frames())), raw_frame(2))
    with pytest.raises(MediaError, match=r"/status is of type diagnostic_msgs/msg/DiagnosticArray.*/left.*/right"):
        open_source(tmp_path / "two", topic="/status")
    with pytest.raises(MediaError, match=r"/middle is not in it.*/left"):
        open_source(tmp_path / "two", topic="/middle")


def test_the_pictures_of_flow_are_not_taken_for_those_of_a_camera(tmp_path: Path) -> None:
    """A bag of results, given in place of the recording, gave the flow of the colours of flow."""
    depth = Frame(np.zeros(24 * 32 * 8, np.uint8), 24, 32, 256, "32FC2", False, 1, 1, "eye")
    for name, topics in (("flow", ("/n/flow", "/n/flow_color")), ("both", ("/n/flow", "/n/flow_color", "/cam"))):
        with BagWriter(tmp_path / name) as writer:
            for topic in topics:
                writer.write_frame(topic, depth if topic == "/n/flow" else raw_frame(1))
    with pytest.raises(MediaError, match=r"holds flow .*/n/flow_color.* and not the images that it was made of"):
        open_source(tmp_path / "flow")
    assert "/cam" in open_source(tmp_path / "both").description
    assert "/n/flow_color" in open_source(tmp_path / "flow", topic="/n/flow_color").description


def test_bag_without_images_lists_what_it_has(tmp_path: Path) -> None:
    """The user has to learn what is in the bag instead."""
    with BagWriter(tmp_path / "bag") as writer:
        writer.write_diagnostics("/status", "engine", {}, 0, 0)
    with pytest.raises(
        MediaError, match=r"holds no images.*/status \(diagnostic_msgs/msg/DiagnosticArray, 1 messages\)"
    ):
        open_source(tmp_path / "bag")


def test_unfinished_and_foreign_bags_are_named(tmp_path: Path) -> None:
    """Missing metadata with one data file is no obstacle; foreign files behind a bag's name are refused."""
    bag = write_bag(tmp_path / "bag")
    (bag / "metadata.yaml").unlink()
    assert len(list(open_source(bag).frames())) == 4
    (tmp_path / "text.bag").write_text("not a bag")
    (tmp_path / "text.mcap").write_text("not a bag")
    sqlite3.connect(tmp_path / "other.db3").execute("create table t (x)").connection.close()
    for name in ("text.bag", "text.mcap", "other.db3"):
        with pytest.raises(MediaError, match=name):
            open_source(tmp_path / name)


def write_video(path: Path, frames: int = 12, fps: float = 12.5) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (64, 48))
    for number in range(frames):
        writer.write(picture(number, 48, 64))
    writer.release()
    return path


def test_video_is_stamped_by_its_own_times(tmp_path: Path) -> None:
    """Stamps drive everything downstream: they must follow the video's rate, start above 0 and never stand still."""
    source = open_source(write_video(tmp_path / "v.mp4"))
    frames = list(source.frames())
    assert (source.kind, source.count, source.nominal_period_ns) == ("video", 12, 80_000_000)
    assert [frame.stamp_ns for frame in frames] == [1_000_000_000 + n * 80_000_000 for n in range(12)]
    assert {(frame.encoding, frame.width, frame.height, frame.step) for frame in frames} == {("bgr8", 64, 48, 192)}
    shown = frames[3].data.reshape(48, 64, 3).astype(int)
    assert np.abs(shown - picture(3, 48, 64)).mean() < 12, "lossy, but the third picture, in BGR"


def test_unreadable_videos_are_named(tmp_path: Path) -> None:
    """Text, an empty file and a video that lost its index all end in one clear sentence."""
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = write_video(tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    for name in ("text.txt", "empty.mp4", "cut.mp4"):
        with pytest.raises(MediaError, match=f"{name} is not readable as a video"):
            open_source(tmp_path / name)


def test_folder_is_read_in_natural_order_and_gaps_stay_gaps(tmp_path: Path) -> None:
    """Frame 10 comes after frame 9; sizes may differ; a broken or missing file costs its own slot, and is named."""
    for number in (7, 8, 9, 10):
        cv2.imwrite(str(tmp_path / f"f{number}.png"), picture(number, 24 + number))
    (tmp_path / "f9.png").write_bytes(b"broken")
    cv2.imwrite(str(tmp_path / "f13.png"), np.full((8, 9), 40000, np.uint16))
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_source(tmp_path, fps=20)
    frames = list(source.frames())
    assert (source.kind, source.count, source.nominal_period_ns) == ("folder", 5, 50_000_000)
    assert [frame.height for frame in frames] == [31, 32, 34, 8]
    assert [frame.stamp_ns for frame in frames] == [1_000_000_000 + slot * 50_000_000 for slot in (0, 1, 3, 6)]
    assert (frames[3].encoding, frames[3].step) == ("mono16", 18) and frames[3].data.view(np.uint16)[0] == 40000
    missing, broken = source.skipped
    assert "(11, 12)" in missing and broken.startswith("f9.png")


@pytest.mark.parametrize("inner", ["mav0/cam0/data", "drive_0001_sync/image_02/data", "P000/image_left", "rgb"])
def test_the_outer_folder_of_a_data_set_names_the_inner_ones(tmp_path: Path, inner: str) -> None:
    """EuRoC, KITTI, TartanAir, TUM RGB-D: whoever downloads one has the outer folder at hand."""
    (tmp_path / inner).mkdir(parents=True)
    (tmp_path / "rgb.txt").write_text("# timestamp filename\n")
    cv2.imwrite(str(tmp_path / inner / "1403636579.763555.png"), picture(0))
    with pytest.raises(MediaError, match=f"holds no image .* the recordings below it: {inner}; give one of them"):
        open_source(tmp_path)
    with pytest.raises(MediaError, match=r"a frame rate \(9 Hz\) .* is a file, which has times of its own"):
        open_source(tmp_path / "rgb.txt", fps=9)


def test_images_that_are_there_in_part_only_are_named(tmp_path: Path) -> None:
    """OpenCV makes a grey half of half a JPEG file, and takes the first of several pictures, without a word."""
    whole = cv2.imencode(".jpg", picture(0, 48, 64))[1].tobytes()
    (tmp_path / "0.jpg").write_bytes(whole)
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) * 2 // 3] + b"\xff\xd9")
    (tmp_path / "2.png").symlink_to(tmp_path / "moved.png")
    first, *others = (Image.fromarray(picture(n, 48, 64)) for n in range(3))
    first.save(tmp_path / "3.tiff", save_all=True, append_images=others)
    source = open_source(tmp_path)
    assert [frame.stamp_ns for frame in source.frames()] == [1_000_000_000, 1_099_999_999]
    expected = ("1.jpg: not a whole image", "2.png: ", "3.tiff: it holds 3 pictures, of which")
    assert all(text.startswith(start) for text, start in zip(source.skipped, expected, strict=True))
    with pytest.raises(MediaError, match="holds 3 pictures, of which only the first is read; a video of them"):
        open_source(tmp_path / "3.tiff")


def test_names_that_are_not_utf_8_do_not_end_the_process(tmp_path: Path) -> None:
    """Of such a name OpenCV dies with a segmentation fault; disks of foreign systems have them."""
    (tmp_path / os.fsdecode(b"bild\xe4.png")).write_bytes(cv2.imencode(".png", picture(3))[1].tobytes())
    (frame,) = open_source(tmp_path).frames()
    assert np.array_equal(frame.data.reshape(24, 32, 3), picture(3))
    with pytest.raises(MediaError, match="expected a name in UTF-8, got b'fahrt"):
        open_source(os.fsdecode(b"fahrt\xe4.mp4"))
    with pytest.raises(MediaError, match="is an address"):
        open_source("rtsp://camera/1")


def test_sixteen_bits_of_colour_are_kept(tmp_path: Path) -> None:
    """Of a camera that uses few of its counts, the upper eight bits are a black picture."""
    cv2.imwrite(str(tmp_path / "0.png"), np.full((8, 9, 3), (7, 8, 900), np.uint16))
    (frame,) = open_source(tmp_path).frames()
    assert (frame.encoding, frame.step) == ("bgr16", 54) and frame.data.view(np.uint16)[:3].tolist() == [7, 8, 900]


def test_unusable_inputs_are_named(tmp_path: Path) -> None:
    """Each wrong input gets its own sentence: what it is, and what was expected."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"broken")
    cv2.imwrite(str(tmp_path / "one.png"), picture(0))
    (tmp_path / "metadata.yaml").write_text("rosbag2_bagfile_information:\n")
    for name, start in (
        ("a.mcap.zst", b"\x28\xb5\x2f\xfd"),
        ("bag.zip", b"PK\3\4"),
        ("bag.tar", bytes(257) + b"ustar"),
    ):
        (tmp_path / name).write_bytes(start + bytes(99))
    for name, message in (
        ("metadata.yaml", "it is the list of a bag's files; give the folder"),
        ("a.mcap.zst", "packed by zstd; unpack"),
        ("bag.zip", "packed by zip; unpack"),
        ("bag.tar", "packed by tar; unpack"),
        ("nowhere", "does not exist; expected a bag, a video file"),
        ("empty", "holds no image .* it holds nothing"),
        ("one.png", "single image, which shows no motion"),
    ):
        with pytest.raises(MediaError, match=message):
            open_source(tmp_path / name)
    with pytest.raises(MediaError, match=r"none of the 1 images of folder broken.* can be read: a.png"):
        list(open_source(tmp_path / "broken").frames())
    with pytest.raises(MediaError, match="only bags have topics"):
        open_source(tmp_path / "broken", topic="/camera")
    with pytest.raises(MediaError, match="camera 91 cannot be opened; video devices on this machine: "):
        open_source("91")
    with pytest.raises(MediaError, match="the input is empty"):
        open_source("")
