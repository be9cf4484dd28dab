# SPDX-License-Identifier: Apache-2.0
"""Recordings of video: every form of its messages, seeking, and what is lost."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from video_streams import (
    CODECS,
    COUNT,
    FFMPEG,
    FOXGLOVE,
    KEY_EVERY,
    PERIOD_NS,
    TOPIC,
    encode,
    source_pictures,
    stamp_of,
    write_foxglove,
    write_ros,
)

from deq_flow_ros.recordings import Frame, MediaError, open_source


def image(frame: Frame) -> np.ndarray:
    return frame.data.reshape(frame.height, frame.width, 3)


def write(path: Path, form: str, packets: dict[int, bytes], codec: str) -> Path:
    if form == "protobuf":
        return write_foxglove(path.with_suffix(".mcap"), packets, {"libx264": "h264", "libx265": "h265"}[codec])
    format = f"{codec};yuv420p;bgr8;bgr8" if form == FFMPEG else codec.replace("libx", "h")
    return write_ros(path, packets, form, format)


@pytest.mark.parametrize("form", [FFMPEG, FOXGLOVE, "protobuf"])
def test_every_form_of_message_gives_the_same_pictures(tmp_path: Path, form: str) -> None:
    """Also that of other programs than ROS; the pictures are those that were encoded, with their own stamps."""
    for codec in CODECS:
        packets = dict(enumerate(encode(source_pictures(), codec)))
        source = open_source(write(tmp_path / codec, form, packets, codec))
        assert (source.count, source.nominal_period_ns) == (COUNT, PERIOD_NS)
        for _ in range(2):  # as a player that loops
            frames = list(source.frames())
            assert [(one.stamp_ns, one.frame_id, one.encoding) for one in frames] == [
                (stamp_of(number), "eye", "rgb8") for number in range(COUNT)
            ]
            for one, original in zip(frames, source_pictures(), strict=True):
                assert np.abs(image(one).astype(int) - original).mean() < 4
        assert source.skipped == []


def test_a_part_begins_at_the_key_frame_before_it(tmp_path: Path) -> None:
    """Its first picture needs those before it, back to a key frame, and none before that."""
    packets = dict(enumerate(encode(source_pictures(), "libx264")))
    whole = list(open_source(write_ros(tmp_path / "whole", packets, FOXGLOVE, "h264")).frames())
    packets[1] = bytes(50)  # no part of what is decoded
    bag = write_ros(tmp_path / "bag", packets, FOXGLOVE, "h264")
    for start in (KEY_EVERY, KEY_EVERY + 2, COUNT - 1):
        source = open_source(bag, start_s=(start - 0.5) * PERIOD_NS * 1e-9)
        part = list(source.frames())
        assert [one.stamp_ns for one in part] == [stamp_of(number) for number in range(start, COUNT)]
        assert all(np.array_equal(one.data, two.data) for one, two in zip(part, whole[start:], strict=True))
        assert source.left_out == start


def test_what_is_lost_gives_frames_without_image_until_the_next_key_frame(tmp_path: Path) -> None:
    """Each is there with its stamp and a reason: after a beginning in the middle, and after a missing packet."""
    packets = dict(enumerate(encode(source_pictures(), "libx264")))
    del packets[0], packets[KEY_EVERY + 1]
    source = open_source(write_ros(tmp_path / "bag", packets, FFMPEG, "h264_nvenc"))
    frames = {(one.stamp_ns - stamp_of(0)) // PERIOD_NS: one.problem for one in source.frames()}
    lost = f"no key frame since packet {KEY_EVERY + 2} followed {KEY_EVERY}"
    after = dict.fromkeys(range(KEY_EVERY + 2, 2 * KEY_EVERY), lost)
    problems = {number: why for number, why in frames.items() if why}
    assert problems == dict.fromkeys(range(1, 4), "no key frame yet") | after
    assert sorted(frames) == sorted(packets) and all(two > one for one, two in pairwise(frames))
    with pytest.raises(MediaError, match=r"none of the 3 images .* can be read: no key frame yet"):
        list(open_source(write_ros(tmp_path / "none", {i: packets[i] for i in (1, 2, 3)}, FFMPEG, "h264")).frames())


def test_video_is_said_to_be_so_and_other_codecs_are_refused_by_name(tmp_path: Path) -> None:
    """In VP9 and AV1 nobody could tell a picture whose reference is lost."""
    packets = dict(enumerate(encode(source_pictures(4), "libx264")))
    source = open_source(write_ros(tmp_path / "bag", packets, FFMPEG, "h264"))
    assert source.description == f"bag bag: {TOPIC} ({FFMPEG}), 4 frames at about 25.0 Hz"
    for name in ("vp9", "ffv1"):
        bag = write_ros(tmp_path / name, packets, FOXGLOVE, name)
        with pytest.raises(MediaError, match=f"cannot decode video of format '{name}': expected h264 or h265"):
            list(open_source(bag).frames())
