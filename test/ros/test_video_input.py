# SPDX-License-Identifier: Apache-2.0
"""Video as the input of the node: with the real messages where they are installed, and with others in their place."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import running_node
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from video_streams import KEY_EVERY, encode, source_pictures, stamp_of

from deq_flow_ros.ros import messages
from deq_flow_ros.ros.convert import image_to_rgb, ns_to_stamp
from deq_flow_ros.ros.messages import FFMPEG, FOXGLOVE, Source, VideoInput, candidates


def stand_in(number: int, data: bytes) -> Any:
    """A ``foxglove_msgs/CompressedVideo``."""
    return SimpleNamespace(timestamp=ns_to_stamp(stamp_of(number)), frame_id="eye", data=data, format="h264")


def test_messages_of_video_become_images_and_what_the_network_loses_is_known() -> None:
    """Every message is decoded; it becomes RGB only where it is used."""
    video, packets = VideoInput(), encode(source_pictures(), "libx264")
    image, problem = video.image(stand_in(0, packets[0]), lost=0)
    assert problem is None and image.format == "h264"
    assert (image.header.frame_id, image.header.stamp) == ("eye", ns_to_stamp(stamp_of(0)))
    assert np.abs(image_to_rgb(image).astype(int) - source_pictures()[0]).mean() < 4
    for number in (2, 3):
        image, problem = video.image(stand_in(number, packets[number]), lost=1 if number == 2 else 0)
        assert image.picture is None and problem == "no key frame since the network lost 1 messages"
    assert video.image(stand_in(KEY_EVERY, packets[KEY_EVERY]), lost=0)[1] is None


def test_video_is_looked_for_where_its_transports_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw and compressed images go before it; asked for without its messages, it is refused with the cure."""

    class CompressedVideo:
        __module__ = "foxglove_msgs.msg._compressed_video"

    rclpy.init()
    node = Node("camera")
    try:
        monkeypatch.setattr(messages, "FFMPEG", None)
        monkeypatch.setattr(messages, "FOXGLOVE", CompressedVideo)
        beside, alone = Source("/camera/image/foxglove", CompressedVideo), Source("/camera/image", CompressedVideo)
        assert alone.type_name() == "foxglove_msgs/msg/CompressedVideo"
        assert candidates(node, "~/", "video") == [beside, alone]
        raw, compressed = Source("/camera/image", Image), Source("/camera/image/compressed", CompressedImage)
        last = Source("/camera/image", CompressedImage)
        assert candidates(node, "~/", "auto") == [raw, compressed, beside, alone, last]
        monkeypatch.setattr(messages, "FOXGLOVE", None)
        assert candidates(node, "~/", "auto") == [raw, compressed, last]
        with pytest.raises(ValueError, match=r"apt install ros-\$ROS_DISTRO-ffmpeg-image-transport-msgs or"):
            candidates(node, "~/", "video")
    finally:
        node.destroy_node()
        rclpy.shutdown()


@pytest.mark.skipif(FFMPEG is None or FOXGLOVE is None, reason="needs ffmpeg_image_transport_msgs and foxglove_msgs")
@pytest.mark.parametrize("transport", ["ffmpeg", "foxglove"])
def test_the_node_gives_flow_of_video_and_an_account_of_each_message(tmp_path: Path, transport: str) -> None:
    """Those that cannot be decoded have theirs as well."""
    packets = encode(source_pictures(), "libx264")
    with running_node(tmp_path, "~/image:=/eye/image", image_transport="auto") as (client, children):
        kind = FFMPEG if transport == "ffmpeg" else FOXGLOVE
        sender = client.create_publisher(kind, f"/eye/image/{transport}", QoSProfile(depth=100))
        client.until(lambda: sender.get_subscription_count() or None, "the node's subscription to the video")
        # Two are never sent, as if a recording began, and a sender failed, there.
        sent = {number: data for number, data in enumerate(packets) if number not in (0, KEY_EVERY + 1)}
        for place, (number, data) in enumerate(sent.items(), 1):
            message = kind()
            if transport == "ffmpeg":
                message.header.stamp, message.header.frame_id = ns_to_stamp(stamp_of(number)), "eye"
                message.encoding, message.pts = "libx264;yuv420p;bgr8;bgr8", number
            else:
                message.timestamp, message.frame_id, message.format = ns_to_stamp(stamp_of(number)), "eye", "h264"
            message.data.frombytes(data)
            sender.publish(message)
            client.until(lambda place=place: len(client.accounts) == place, "the account of the message")
        client.until(lambda: len(client.flow) == 4, "the flow of the last one")
        found = [(account["outcome"], account.get("reason", "")) for account in client.accounts]
        assert [outcome[0] for outcome, _ in found] == list("dddfddpppp")
        assert all(reason == "no key frame yet" for _, reason in found[:3])
        assert all(reason.startswith("no key frame since packet") for _, reason in found[4:6])
        assert client.flow[-1].header.frame_id == "eye"
        assert "an image takes no part: no key frame yet" in children.log("flow_node").read_text()
