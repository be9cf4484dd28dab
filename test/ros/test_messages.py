# SPDX-License-Identifier: Apache-2.0
"""What the node takes in: camera_info of every kind, and video."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import running_node
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from std_msgs.msg import Header
from video_streams import KEY_EVERY, encode, source_pictures, stamp_of

from deq_flow_ros.imaging.video import VideoDecoder
from deq_flow_ros.ros import messages
from deq_flow_ros.ros.camera_info import WHOLE, Calibration, adapted, camera_model, image_size, remember
from deq_flow_ros.ros.messages import FFMPEG, FOXGLOVE, Source, candidates, image_to_rgb, ns_to_stamp, video_image


def calibration(**changes: object) -> CameraInfo:
    """Of a 640 x 480 sensor behind a lens that distorts, right camera of a stereo pair."""
    message = CameraInfo(
        header=Header(frame_id="camera"),
        width=640,
        height=480,
        distortion_model="plumb_bob",
        d=[-0.3, 0.1, 0.001, -0.0005, -0.02],
        k=[600.0, 0, 331, 0, 590, 245, 0, 0, 1],
        r=[1.0, 0, 0, 0, 1, 0, 0, 0, 1],
        p=[580.0, 0, 325, -58, 0, 580, 240, 0, 0, 0, 1, 0],
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return message


HEADER = Header(frame_id="camera_of_the_flow")
PIXELS = np.array([[0.0, 0.0], [60.0, 50.0], [150.0, 90.0]])


def test_binning_and_region_are_respected() -> None:
    """By the message's comments: pixel u of the image is u * binning + x_offset of the sensor that K describes."""
    roi = RegionOfInterest(x_offset=100, y_offset=40, width=400, height=300)
    message = calibration(binning_x=2, binning_y=2, roi=roi)
    camera = camera_model(message)
    assert (camera.height, camera.width) == image_size(message) == (150, 200)
    expected = camera_model(calibration()).bearings(PIXELS * 2 + (100, 40))
    assert np.allclose(camera.bearings(PIXELS), expected, atol=1e-7)
    rectified = camera_model(message, rectified=True)
    assert rectified.distortion_model == "none"
    assert np.allclose(rectified.normalized(PIXELS), (PIXELS * 2 + (100, 40) - (325, 240)) / 580)


@pytest.mark.parametrize("binning", [0, 1, 2])
@pytest.mark.parametrize("region", [WHOLE, (0, 0, 100, 80), (31, 17, 200, 100)])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
def test_the_adapted_message_gives_the_rays_of_the_input(
    binning: int, region: tuple[int, int, int, int], scale: float
) -> None:
    """Whatever the crop and the scale, and for raw as for rectified images."""
    roi = RegionOfInterest(x_offset=20, y_offset=14, width=600, height=440) if binning else RegionOfInterest()
    message = calibration(binning_x=binning, binning_y=binning, roi=roi)
    height, width = image_size(message)
    x, y, part_width, part_height = region if region != WHOLE else (0, 0, width, height)
    size = round(part_height * scale), round(part_width * scale)
    result = adapted(message, HEADER, region, size)
    assert result.header == HEADER and image_size(result) == size
    published = PIXELS * (size[1] / part_width, size[0] / part_height)
    for rectified in (False, True):
        expected = camera_model(message, rectified).bearings(PIXELS + np.array([x, y]))
        assert np.allclose(camera_model(result, rectified).bearings(published), expected, atol=1e-7)


def test_what_is_not_changed_is_passed_on() -> None:
    """A crop keeps the calibration of the sensor (crop_decimate), a scale the baseline in pixels (resize)."""
    message = calibration()
    same = adapted(message, HEADER, WHOLE, (480, 640))
    assert same == calibration(header=HEADER) and message == calibration()
    part = adapted(message, HEADER, (31, 17, 200, 100), (100, 200))
    roi = RegionOfInterest(x_offset=31, y_offset=17, width=200, height=100, do_rectify=True)
    assert part == calibration(header=HEADER, roi=roi)
    half = adapted(message, HEADER, WHOLE, (240, 320))
    assert half.p.tolist() == [290.0, 0, 162.5, -29, 0, 290, 120, 0, 0, 0, 1, 0]
    assert half.k.tolist() == [300.0, 0, 165.5, 0, 295, 122.5, 0, 0, 1]
    assert (half.d, half.r.tolist(), half.width, half.height) == (message.d, message.r.tolist(), 320, 240)
    assert message == calibration()


def test_uncalibrated_cameras_are_passed_on_but_have_no_rays() -> None:
    """K[0] == 0 is how ROS says "not calibrated"; drivers publish it."""
    message = CameraInfo(width=640, height=480)
    result = adapted(message, HEADER, WHOLE, (240, 320))
    assert (result.height, result.width, result.k[0], result.header) == (240, 320, 0.0, HEADER)
    with pytest.raises(ValueError, match=r"not calibrated: expected K\[0\] above 0, got 0"):
        camera_model(message)
    with pytest.raises(ValueError, match=r"expected P\[0\] above 0, got 0"):
        camera_model(calibration(p=np.zeros(12)), rectified=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distortion_model": "plumb"}, "plumb_bob.*got 'plumb'"),
        ({"d": [0.1, 0.2]}, "4, 5, 8, 12 or 14 finite coefficients"),
        ({"k": [600.0, 0, 0, 0, 590, 0, 331, 245, 1]}, "last row of K, got .331.0, 245.0, 1.0.: is it transposed"),
        ({"k": [0.0035, 0, 0.0018, 0, 0.0035, 0.0013, 0, 0, 1]}, r"in pixels, got K.0. = 0.0035 for 640 px"),
        ({"k": [600.0, 3, 331, 0, 590, 245, 0, 0, 1]}, r"without skew, got K\[1\] = 3"),
        ({"width": 0}, "got 0 x 480"),
        ({"roi": RegionOfInterest(x_offset=600, width=100, height=100)}, "640 x 480 image, got x 600"),
    ],
)
def test_contradictions_are_named(change: dict, words: str) -> None:
    """Bearings from a broken calibration would look as good as right ones."""
    with pytest.raises(ValueError, match=words):
        camera_model(calibration(**change))


def test_a_part_outside_of_the_image_is_named() -> None:
    """A region of interest that was set for another camera."""
    with pytest.raises(
        ValueError, match="within the 640 x 480 px of camera_info, got x 600, y 0, width 100, height 50"
    ):
        adapted(calibration(), HEADER, (600, 0, 100, 50), (50, 100))
    with pytest.raises(ValueError, match="within the 0 x 480 px of camera_info"):
        adapted(calibration(width=0), HEADER, WHOLE, (480, 640))


def test_cameras_without_distortion_need_no_model() -> None:
    """Simulators and drivers of rectified images name any model, or none."""
    for model, d in (("", []), ("plumb_bob", [0.0] * 5), ("perspective", [])):
        assert camera_model(calibration(distortion_model=model, d=d)).distortion_model == "none"
    assert camera_model(calibration(distortion_model="equidistant", d=[0.0] * 4)).distortion_model == "equidistant"


def stand_in(number: int, data: bytes) -> Any:
    """A ``foxglove_msgs/CompressedVideo``."""
    return SimpleNamespace(timestamp=ns_to_stamp(stamp_of(number)), frame_id="eye", data=data, format="h264")


def test_messages_of_video_become_images_and_what_the_network_loses_is_known() -> None:
    """Every message is decoded; it becomes RGB only where it is used."""
    video, packets = partial(video_image, VideoDecoder()), encode(source_pictures(), "libx264")
    image, problem = video(stand_in(0, packets[0]), lost=0)
    assert problem is None and image.format == "h264"
    assert (image.header.frame_id, image.header.stamp) == ("eye", ns_to_stamp(stamp_of(0)))
    assert np.abs(image_to_rgb(image).astype(int) - source_pictures()[0]).mean() < 4
    for number in (2, 3):
        image, problem = video(stand_in(number, packets[number]), lost=1 if number == 2 else 0)
        assert image.picture is None and problem == "no key frame since the network lost 1 messages"
    assert video(stand_in(KEY_EVERY, packets[KEY_EVERY]), lost=0)[1] is None


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
        client.until(lambda: "images could not be used" in children.log("flow_node").read_text(), "words in the log")
        assert ": no key frame" in children.log("flow_node").read_text()


def test_there_are_no_bearings_and_no_camera_info_while_the_camera_zooms() -> None:
    """A zoom moves pixels as an approach does; what focusing changes from image to image does not count."""
    infos: dict[int, CameraInfo] = {}
    for second, factor in enumerate((1.0, 1.0005, 1.01, 1.0)):
        info = calibration()
        info.header.stamp.sec, info.roi.width, info.roi.height = second, 640, 480
        info.k[0], info.k[4] = factor * info.k[0], factor * info.k[4]
        info.roi.x_offset = 2 if second == 3 else 0
        info.roi.width -= info.roi.x_offset
        remember(infos, info)
    for other, known in ((1, True), (2, False), (3, False)):
        found = Calibration(infos[0], other=infos[10**9 * other]).of_field(Header(), (480, 640), WHOLE)
        assert (found[0] is not None, found[1] is not None) == (known, known)
        assert known == ("it changed between the two images, as where a camera zooms" not in found[2])
