# SPDX-License-Identifier: Apache-2.0
"""`player` as a process of its own: what is recorded arrives, in its rhythm, with its stamps."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import video_streams as video
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from deq_flow_ros.imaging import frame_from_array, stamp_to_ns
from deq_flow_ros.recordings import open_source
from deq_flow_ros.recordings.bag_source import CAMERA_INFO, IMAGE
from deq_flow_ros.recordings.bags import BagWriter
from deq_flow_ros.ros.player import main

COUNT, PERIOD_NS = 24, 33_333_333


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that tell their number: 0.png is all 0, 1.png all 1, and so on; 10 must not come before 2."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((32, 40, 3), number, np.uint8))
    return folder


@pytest.fixture(scope="module")
def calibrated_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rosbag2 of 12 grey-to-red images with one calibration beside them, as cameras record it."""
    path = tmp_path_factory.mktemp("bags") / "calibrated"
    types = get_typestore(Stores.ROS2_JAZZY)
    message = types.types
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:

        def write(connection: Any, kind: str, stamp_ns: int, **fields: Any) -> None:
            stamp = message["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9))
            header = message["std_msgs/msg/Header"](stamp, "eye")
            writer.write(connection, stamp_ns, types.serialize_cdr(message[kind](header=header, **fields), kind))

        images = writer.add_connection("/cam/image_raw", IMAGE, typestore=types)
        infos = writer.add_connection("/cam/camera_info", CAMERA_INFO, typestore=types)
        roi = message["sensor_msgs/msg/RegionOfInterest"](1, 2, 16, 20, True)
        matrices = {"d": np.arange(5.0), "k": np.arange(9.0), "r": np.eye(3).ravel(), "p": np.arange(12.0)}
        for number in range(12):
            stamp_ns = 5_000_000_000 + number * PERIOD_NS
            pixels = np.full((32, 40, 3), (20 * number, 60, 60), np.uint8)
            fields = {"height": 32, "width": 40, "encoding": "rgb8", "is_bigendian": 0, "step": 120}
            write(images, IMAGE, stamp_ns, **fields, data=pixels.ravel())
            if number == 0:
                fields = {"height": 32, "width": 40, "distortion_model": "plumb_bob", "binning_x": 0, "binning_y": 0}
                write(infos, CAMERA_INFO, stamp_ns, **fields, **matrices, roi=roi)
    return path


class Subscriber(Node):
    """Collects (arrival on the monotonic clock, message) of the player's topic."""

    def __init__(self) -> None:
        super().__init__("subscriber")
        self.received: list[tuple[int, Image]] = []
        self.subscription = self.create_subscription(
            Image, "/player/image", lambda m: self.received.append((time.monotonic_ns(), m)), QoSProfile(depth=100)
        )
        self.executor_of_mine = SingleThreadedExecutor()
        self.executor_of_mine.add_node(self)

    def spin_while(self, process: subprocess.Popen[str], timeout_s: float, enough: int | None = None) -> None:
        """Collect until the process ends, or until enough messages came."""
        give_up = time.monotonic() + timeout_s
        while process.poll() is None and (enough is None or len(self.received) < enough):
            assert time.monotonic() < give_up, f"the player still runs; {len(self.received)} messages came"
            self.executor_of_mine.spin_once(timeout_sec=0.02)
        for _ in range(COUNT):
            self.executor_of_mine.spin_once(timeout_sec=0.02)


@pytest.fixture
def subscriber() -> Iterator[Subscriber]:
    rclpy.init()
    node = Subscriber()
    yield node
    node.destroy_node()
    rclpy.shutdown()


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deq_flow_ros.ros.player", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Status, last line of standard output, and standard error."""
    out, err = process.communicate(timeout=20)
    return process.returncode, out.strip().splitlines()[-1] if out.strip() else "", err


def test_each_image_arrives_in_order_at_the_recorded_rate(subscriber: Subscriber, folder: Path, tmp_path: Path) -> None:
    """Contents, stamps and rhythm of a replay are what everything measured on it rests on."""
    log = tmp_path / "published.jsonl"
    process = start(folder, "--rate", 2, "--wait-for-subscribers", 1, "--log", log)
    subscriber.spin_while(process, 30.0)
    status, last_line, _ = finish(process)
    assert status == 0
    first_ns = stamp_to_ns(subscriber.received[0][1].header.stamp)
    stamps = [stamp_to_ns(message.header.stamp) for _, message in subscriber.received]
    assert stamps == [first_ns + number * PERIOD_NS for number in range(COUNT)]
    for number, (_, message) in enumerate(subscriber.received):
        assert (message.height, message.width, message.step, message.encoding) == (32, 40, 120, "bgr8")
        assert set(message.data) == {number} and len(message.data) == 32 * 120
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["stamp_ns"] for line in lines] == stamps and [line["number"] for line in lines] == list(range(COUNT))
    # At rate 2, images are half their recorded distance apart; single ones may be late on a busy machine.
    delays = [line["published_ns"] - stamp / 2 for line, stamp in zip(lines, stamps, strict=True)]
    assert np.median(np.subtract(delays, min(delays))) < 0.02e9
    last_ns = stamps[-1]
    expected = f"published {COUNT} frames, first stamp {first_ns / 1e9:.9f}, last stamp {last_ns / 1e9:.9f}"
    assert last_line == f"player: {expected}"


def test_a_loop_repeats_the_stamps_and_ends_cleanly_on_sigint(subscriber: Subscriber, folder: Path) -> None:
    """Ctrl-C is how a loop ends; it is no failure, and the summary must still come."""
    parameters = (f"input:={folder}", "loop:=true", "rate:=4.0", "wait_for_subscribers:=1")
    process = start("--ros-args", *(word for parameter in parameters for word in ("-p", parameter)))
    subscriber.spin_while(process, 30.0, enough=COUNT + 3)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # as `ros2 launch` does
    subscriber.spin_while(process, 10.0)
    status, last_line, err = finish(process)
    assert status == 0 and "Traceback" not in err
    stamps = [stamp_to_ns(message.header.stamp) for _, message in subscriber.received]
    assert stamps[COUNT : COUNT + 3] == stamps[:3]
    assert last_line.startswith(f"player: published {len(stamps)} frames")


def test_a_bag_goes_out_compressed_with_its_calibration(subscriber: Subscriber, calibrated_bag: Path) -> None:
    """What otherwise only a camera and its driver show: compressed topics, and camera_info that pairs by stamp."""
    pictures: list[CompressedImage] = []
    infos: list[CameraInfo] = []
    qos = QoSProfile(depth=100)
    subscriber.create_subscription(CompressedImage, "/cam/image_raw/compressed", pictures.append, qos)
    subscriber.create_subscription(CameraInfo, "/cam/camera_info", infos.append, qos)
    remap = ("--ros-args", "-r", "~/image:=/cam/image_raw")
    process = start(calibrated_bag, "--compressed", "png", "--wait-for-subscribers", 1, *remap)
    subscriber.spin_while(process, 30.0)
    assert finish(process)[0] == 0 and not subscriber.received, "raw images beside the compressed ones"
    assert [stamp_to_ns(picture.header.stamp) for picture in pictures] == [
        5_000_000_000 + number * PERIOD_NS for number in range(12)
    ]
    for number, picture in enumerate(pictures):
        assert picture.format == "rgb8; png compressed bgr8" and picture.header.frame_id == "eye"
        decoded = cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR)
        assert decoded.shape == (32, 40, 3) and (decoded == (60, 60, 20 * number)).all()
    assert [info.header for info in infos] == [picture.header for picture in pictures]
    info = infos[-1]
    assert (info.height, info.width, info.distortion_model, list(info.d)) == (32, 40, "plumb_bob", [0, 1, 2, 3, 4])
    assert list(info.k) == list(range(9)) and list(info.p) == list(range(12))
    assert (info.roi.x_offset, info.roi.y_offset, info.roi.height, info.roi.width) == (1, 2, 16, 20)


def test_a_message_that_cannot_be_sent_or_read_costs_itself_only(subscriber: Subscriber, tmp_path: Path) -> None:
    """A bag with one image cut short as it was recorded, and one that contradicts itself: the replay goes on."""
    frames = [
        frame_from_array(np.full((32, 40, 3), i, np.uint8), i * PERIOD_NS, i * PERIOD_NS, "eye") for i in range(6)
    ]
    frames[4] = replace(frames[4], step=7)
    with BagWriter(tmp_path / "bag") as writer:
        for number, frame in enumerate(frames):
            if number == 2:
                writer.write_raw("/cam", IMAGE, bytes([0, 1, 0, 0]), frame.record_ns)
            else:
                writer.write_frame("/cam", frame)
    pictures: list[CompressedImage] = []
    topic = "/player/image/compressed"
    subscriber.create_subscription(CompressedImage, topic, pictures.append, QoSProfile(depth=100))
    (tmp_path / "bag" / "bag_1.mcap").write_bytes(b"of another recording")
    process = start(tmp_path / "bag", "--compressed", "png", "--wait-for-subscribers", 1)
    subscriber.spin_while(process, 30.0)
    status, last_line, err = finish(process)
    assert "bag_1.mcap: metadata.yaml of" in err, "what is wrong with the recording as a whole is named as well"
    assert status == 0 and "Traceback" not in err and last_line.endswith(", 3 problems, named above")
    assert [stamp_to_ns(picture.header.stamp) for picture in pictures] == [i * PERIOD_NS for i in (0, 1, 3, 5)]
    assert f"recorded at {2 * PERIOD_NS} ns cannot be decoded" in err
    assert f"left out the frame stamped {4 * PERIOD_NS} ns" in err


def test_video_goes_out_as_images_and_what_is_lost_of_it_is_said(subscriber: Subscriber, tmp_path: Path) -> None:
    """So whatever reads images can be tried on it; in a loop, each pass is decoded anew."""
    packets = video.encode(video.source_pictures(), "libx264")
    sent = {number: data for number, data in enumerate(packets) if number not in (0, 1, 2)}
    decoded = {(one.stamp_ns - video.FIRST_NS) // video.PERIOD_NS: one for one in open_source(
        video.write_ros(tmp_path / "bag", sent, video.FFMPEG, "libx264")).frames()}  # fmt: skip
    process = start(
        tmp_path / "bag", "--wait-for-subscribers", 1, "--loop", "--max-frames", 10, "--ros-args", "-p", "rate:=4"
    )  # fmt: skip; a whole number is taken for a real one
    subscriber.spin_while(process, 30.0)
    status, last_line, err = finish(process)
    assert status == 0 and "Traceback" not in err and last_line.endswith(", 2 problems, named above")
    numbers = [(stamp_to_ns(m.header.stamp) - video.FIRST_NS) // video.PERIOD_NS for _, m in subscriber.received]
    assert numbers == [*range(4, 12), 4, 5]
    for number, (_, message) in zip(numbers, subscriber.received, strict=True):
        assert (message.encoding, message.header.frame_id) == ("rgb8", "eye")
        assert np.array_equal(message.data, decoded[number].data)
    assert err.count("left out the frame stamped 1700000000120000000 ns: no key frame yet") == 2


def test_pauses_and_steps_of_a_recordings_clock_are_skipped_and_every_frame_is_played_once(
    subscriber: Subscriber, tmp_path: Path
) -> None:
    """A robot that boots in 1970 and learns the time, an hour without frames, a clock set back: no replay waits."""
    seconds = [5, 1_700_000_000, 1_700_003_600, 1_700_000_100]
    stamps = [second * 10**9 + number * PERIOD_NS for second in seconds for number in range(3)]
    with BagWriter(tmp_path / "bag", "sqlite3") as writer:
        for number, stamp in enumerate(stamps):
            writer.write_frame("/cam", frame_from_array(np.full((32, 40, 3), number, np.uint8), stamp, stamp, "eye"))
    process = start(tmp_path / "bag", "--wait-for-subscribers", 1)
    subscriber.spin_while(process, 30.0)
    status, _, err = finish(process)
    assert status == 0 and [stamp_to_ns(message.header.stamp) for _, message in subscriber.received] == stamps
    for said in ("pauses for 1699999994.9 s", "pauses for 3599.9 s", "steps back by 3500.1 s"):
        assert f"{said} before the frame stamped" in err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["/no/such/file"], 2, ["/no/such/file", "does not exist"]),
        ([], 2, ["no input given"]),
        (["FOLDER", "--rate", "0"], 2, ["--rate: expected at least 0.001, got 0"]),
        (["FOLDER", "--ros-args", "-p", "max_frame:=3", "-p", "max_frames:=-3"], 2, ["did you mean", "-3"]),
        (["FOLDER", "--log", "/no/such/log"], 2, ["cannot write /no/such/log: No such file or directory"]),
        (["FOLDER", "--compressed", "webp"], 2, ['compressed: expected one of "", jpeg, png', "'webp'"]),
        (["FOLDER", "--ros-args", "-p", "rate:=fast"], 2, ["rate", "fast", "DOUBLE"]),
        (["FOLDER", "--ros-args", "-r", "~/image:=/my camera"], 2, ["ROS cannot use", "/my camera"]),
        (["FOLDER", "--wait-for-subscribers", "1", "--wait-timeout-s", "0.2"], 3, ["1 subscriber(s) on /player/image"]),
    ],
)
def test_what_cannot_be_played_is_named(
    folder: Path, arguments: list[str], status: int, words: list[str], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A launch file shows only the status and the last lines."""
    no_signals = nullcontext(SimpleNamespace(requested=False))
    monkeypatch.setattr("deq_flow_ros.ros.process.StopRequest", lambda: no_signals)
    try:
        got: object = main(["player", *[str(folder) if argument == "FOLDER" else argument for argument in arguments]])
    except SystemExit as exit:
        got = exit.code
    err = capfd.readouterr().err
    assert got == status and "Traceback" not in err
    assert all(word in err for word in words), err
