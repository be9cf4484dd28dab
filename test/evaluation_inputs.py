# SPDX-License-Identifier: Apache-2.0
"""What tests of evaluations share: one short stream in every form that a recording may have, and a small model."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import torch
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.typesys import Stores, get_typestore

from deq_flow_ros.imaging import Frame, frame_from_array
from deq_flow_ros.model import DEQFlow, save_model
from deq_flow_ros.recordings.bag_source import COMPRESSED_IMAGE
from deq_flow_ros.recordings.bags import BagWriter

TOPIC = "/camera/image_raw"
PERIOD_NS = 33_333_333
FIRST_NS = 1_000_000_000
HEIGHT, WIDTH = 48, 64


def pictures(count: int = 8, step: int = 2) -> list[np.ndarray]:
    """(48, 64, 3) BGR, moving by `step` px a frame."""
    texture = np.random.default_rng(0).integers(0, 256, (12, 40, 3), np.uint8)
    texture = cv2.resize(texture, (160, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return [np.ascontiguousarray(texture[:, step * i : step * i + WIDTH]) for i in range(count)]


def frames(images: list[np.ndarray]) -> list[Frame]:
    """Stamped as a folder of images at 30 Hz is."""
    stamps = [FIRST_NS + i * PERIOD_NS for i in range(len(images))]
    return [frame_from_array(image, stamp, stamp, "camera") for image, stamp in zip(images, stamps, strict=True)]


def write_folder(path: Path, images: list[np.ndarray]) -> Path:
    path.mkdir()
    for number, image in enumerate(images):
        cv2.imwrite(str(path / f"{number}.png"), image)
    return path


def write_bag(path: Path, stream: list[Frame], storage: str = "mcap") -> Path:
    with BagWriter(path, storage) as writer:
        for frame in stream:
            writer.write_frame(TOPIC, frame)
    return path


def add_compressed(writer: BagWriter, topic: str, data: bytes, stamp_ns: int) -> None:
    """Append a `sensor_msgs/CompressedImage` with the content of a PNG file, recorded at its stamp."""
    types = get_typestore(Stores.ROS2_JAZZY)
    stamp = types.types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9))
    header = types.types["std_msgs/msg/Header"](stamp, "camera")
    message = types.types[COMPRESSED_IMAGE](header, "bgr8; png compressed bgr8", np.frombuffer(data, np.uint8))
    writer.write_raw(topic, COMPRESSED_IMAGE, types.serialize_cdr(message, COMPRESSED_IMAGE), stamp_ns)


def write_compressed(path: Path, stream: list[Frame]) -> Path:
    with BagWriter(path) as writer:
        for frame in stream:
            image = frame.data.reshape(frame.height, frame.width, 3)
            add_compressed(writer, f"{TOPIC}/compressed", cv2.imencode(".png", image)[1].tobytes(), frame.stamp_ns)
    return path


def write_ros1(path: Path, stream: list[Frame]) -> Path:
    types = get_typestore(Stores.ROS1_NOETIC)
    header, time = types.types["std_msgs/msg/Header"], types.types["builtin_interfaces/msg/Time"]
    with Ros1Writer(path) as writer:
        connection = writer.add_connection(TOPIC, "sensor_msgs/msg/Image", typestore=types)
        for number, frame in enumerate(stream):
            message = types.types["sensor_msgs/msg/Image"](
                header(number, time(*divmod(frame.stamp_ns, 10**9)), "camera"), frame.height, frame.width,
                frame.encoding, 0, frame.step, frame.data,
            )  # fmt: skip
            writer.write(connection, frame.record_ns, types.serialize_ros1(message, "sensor_msgs/msg/Image"))
    return path


def write_model(path: Path) -> Path:
    """Weights of the right shape; what the flow looks like does not matter."""
    torch.manual_seed(0)
    save_model(DEQFlow("nano"), path)
    return path


def table(out: Path, setting: str | None = None) -> list[dict[str, str]]:
    """Rows of `frames.csv`, of one setting or of all."""
    with (out / "frames.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if setting in (None, row["setting"])]
