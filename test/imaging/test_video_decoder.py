# SPDX-License-Identifier: Apache-2.0
"""Decoded video: a picture is either that of its packet, or missing with a reason."""

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from video_streams import CODECS, COUNT, KEY_EVERY, OPTIONS, encode, source_pictures, stamp_of

from deq_flow_ros.imaging.encodings import EncodingError
from deq_flow_ros.imaging.video import VideoDecoder, VideoPacket, codec_of

NAMES = {"libx264": "h264", "libx265": "h265"}


def decode(packets: dict[int, bytes], format: str, numbered: bool = False) -> dict[int, np.ndarray | str]:
    """The picture of each packet by its number in the stream, or why there is none."""
    decoder, found = VideoDecoder(), dict[int, np.ndarray | str]()
    for number, data in packets.items():
        packet = VideoPacket(data, format, stamp_of(number), "eye", number if numbered else None)
        try:
            found[number] = decoder.decode(packet).rgb()
        except EncodingError as error:
            found[number] = str(error)
    return found


def missing(found: dict[int, np.ndarray | str]) -> dict[int, str]:
    return {number: what for number, what in found.items() if isinstance(what, str)}


def same(found: dict[int, np.ndarray | str], whole: dict[int, np.ndarray | str]) -> bool:
    """Whether the pictures that there are are right."""
    return all(isinstance(what, str) or np.array_equal(what, whole[number]) for number, what in found.items())


@pytest.mark.parametrize("codec", CODECS)
def test_a_lost_packet_costs_the_pictures_up_to_the_next_key_frame_and_none_is_smeared(codec: str) -> None:
    """The decoder itself would hide the loss, so any packet is lost once, the key frames included."""
    packets = dict(enumerate(encode(source_pictures(), codec)))
    whole = decode(packets, NAMES[codec])
    assert not missing(whole)
    for lost in range(COUNT - 1):
        found = decode({number: data for number, data in packets.items() if number != lost}, NAMES[codec])
        reasons = missing(found)
        assert list(reasons) == list(range(lost + 1, (lost // KEY_EVERY + 1) * KEY_EVERY)) and same(found, whole)
        assert all(
            why.startswith("no key frame yet" if lost == 0 else "no key frame since") for why in reasons.values()
        )


def test_losses_that_the_codec_does_not_show_are_seen_by_numbers_and_time() -> None:
    """In GOPs of 17 pictures, of which x264 counts 16, the first one follows from the last of the GOP before."""
    key = "keyint=17:scenecut=0:bframes=0:ref=1"
    packets = dict(enumerate(encode(source_pictures(20), "libx264", f":{key}")))
    del packets[17]
    assert not missing(decode(packets, "h264")), "another gap would be seen, and this test would show nothing"
    assert missing(decode(packets, "h264", numbered=True)) == dict.fromkeys(
        (18, 19), "no key frame since packet 18 followed 16"
    )
    decoder = VideoDecoder()
    for number in (0, 1, 2):
        decoder.decode(VideoPacket(packets[number], "h264", stamp_of(number), "eye"))
    with pytest.raises(EncodingError, match="the same packet as the one before"):
        decoder.decode(VideoPacket(packets[2], "h264", stamp_of(2), "eye"))
    decoder.decode(VideoPacket(packets[3], "h264", stamp_of(2), "eye"))  # as all are, where a driver gives no stamps
    with pytest.raises(EncodingError, match=r"no key frame since time went back by 40\.0 ms"):
        decoder.decode(VideoPacket(packets[3], "h264", stamp_of(1), "eye"))
    decoder.decode(VideoPacket(packets[0], "h264", stamp_of(2), "eye"))
    with pytest.raises(EncodingError, match="no key frame since the network lost 2 messages"):
        decoder.decode(VideoPacket(packets[1], "h264", stamp_of(3), "eye"), lost="the network lost 2 messages")
    decoder = VideoDecoder()
    for number in (0, 1, 8, 9, 10):  # what the network lost before the key frame 8 is no matter after it
        lost = "the network lost 6 messages" if number == 8 else ""
        decoder.decode(VideoPacket(packets[number % 8], "h264", stamp_of(number), "eye", number), lost)


def test_damaged_packets_are_no_pictures() -> None:
    """Cut short, empty, of zeros, without start codes, of another codec, a key frame among them: nothing is made up."""
    packets = dict(enumerate(encode(source_pictures(), "libx264")))
    whole = decode(packets, "h264")
    for number in (0, 1, KEY_EVERY):
        found = decode({**packets, number: packets[number][: len(packets[number]) // 2]}, "h264")
        assert list(missing(found)) == list(range(number, (number // KEY_EVERY + 1) * KEY_EVERY)) and same(found, whole)
    odd = {1: b"", 2: bytes(60), 3: packets[3][:4].replace(b"\1", b"\0") + packets[3][4:], KEY_EVERY: packets[4][:12]}
    reasons = missing(found := decode({**packets, **odd}, "h264"))
    assert list(reasons) == list(range(1, 2 * KEY_EVERY)) and same(found, whole)
    assert reasons[1] == "expected h264 data with start codes (Annex B), got 0 bytes: -"
    assert "holds no picture" in reasons[KEY_EVERY]
    assert list(missing(decode(packets, "h265"))) == list(range(COUNT))


def test_a_packet_may_hold_parameter_sets_alone_or_several_pictures() -> None:
    """The sets serve the next key frame; of several pictures the stamp is that of the last."""
    packets = encode(source_pictures(), "libx264")
    whole = decode(dict(enumerate(packets)), "h264")
    place = packets[0].index(b"\0\0\1\x65")  # the slice of the key frame
    split = {0: packets[0][:place], 1: packets[0][place:], 2: packets[1] + packets[2], 3: packets[3]}
    found = decode(split, "h264")
    assert missing(found) == {0: "the packet holds no picture, only parameter sets"}
    for number, expected in ((1, 0), (2, 2), (3, 3)):
        assert np.array_equal(found[number], whole[expected])


@pytest.mark.parametrize("codec", CODECS)
def test_pictures_that_come_late_are_refused(codec: str) -> None:
    """With B-frames a packet gives the picture of another one; its stamp would be wrong."""
    name, options = OPTIONS[codec]
    assert name and "bframes=0" in options
    packets = encode(source_pictures(), codec, ":bframes=2:b-adapt=0:keyint=12", tune="")
    reasons = missing(decode(dict(enumerate(packets)), NAMES[codec]))
    assert len(reasons) == COUNT and all("B-frames" in why for why in reasons.values())


def test_interlaced_frames_are_refused() -> None:
    """Analog cameras behind a grabber: half of the lines are of another time, which is no motion of the scene."""
    packets = encode(source_pictures(4), "libx264", ":interlaced=1:tff=1")
    assert all("are interlaced" in why for why in missing(decode(dict(enumerate(packets)), "h264")).values())


def test_intra_refresh_has_no_key_frames_and_is_waited_for() -> None:
    """Its pictures are whole after one round of refreshed columns."""
    packets = dict(enumerate(encode(source_pictures(20), "libx264", ":intra-refresh=1:keyint=6")))
    whole = decode(packets, "h264")
    found = decode({number: data for number, data in packets.items() if number != 2}, "h264")
    assert not missing(whole) and same(found, whole) and 2 <= len(missing(found)) < 13
    assert list(missing(found)) == list(range(3, 3 + len(missing(found))))


def test_the_size_may_change_and_ten_bits_become_eight() -> None:
    """A camera that was set up anew begins with a key frame of another size."""
    small, large = (encode(source_pictures(4, *size), "libx264") for size in ((64, 96), (120, 160)))
    found = decode(dict(enumerate(small + large)), "h264")
    assert [picture.shape for picture in found.values()] == [(64, 96, 3)] * 4 + [(120, 160, 3)] * 4
    deep = decode(dict(enumerate(encode(source_pictures(2), "libx265", pixels="yuv420p10le"))), "hevc")
    assert all(np.abs(deep[i].astype(int) - source_pictures(2)[i]).mean() < 4 for i in range(2))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("matrix", "name"), [(6, "smpte170m"), (1, "bt709")])
@pytest.mark.parametrize("full", [False, True])
def test_colours_follow_the_matrix_and_the_range_of_the_stream(
    codec: str, matrix: int, name: str, full: bool, tmp_path: Path
) -> None:
    """As the source was, but for what 8 bits of YUV round, and as OpenCV 5 has them from a file."""
    colours = np.array([[200, 40, 60], [30, 180, 70], [50, 60, 210], [255, 255, 255], [0, 0, 0], [128, 90, 30]])
    picture = np.repeat(np.repeat(colours.reshape(2, 3, 3), 60, 0), 48, 1).astype(np.uint8)
    range_ = {"libx264": ("fullrange=off", "fullrange=on"), "libx265": ("range=limited", "range=full")}[codec][full]
    of = {"dst_colorspace": matrix, "dst_color_range": 1 + full, "src_color_range": 2}
    packets = encode([picture], codec, f":{range_}:colormatrix={name}:crf=1", **of)
    decoded = decode(dict(enumerate(packets)), NAMES[codec])[0]
    centres = decoded[30::60, 24::48].reshape(-1, 3).astype(int)
    assert np.abs(centres - colours).max() <= 3
    (tmp_path / "video").write_bytes(packets[0])
    read, bgr = cv2.VideoCapture(str(tmp_path / "video"), cv2.CAP_FFMPEG).read()
    if int(cv2.__version__.partition(".")[0]) >= 5:
        assert read and np.abs(bgr[..., ::-1].astype(int) - decoded).max() <= 2


def test_other_codecs_old_libraries_and_none_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with what to do."""
    for name in ("libx264", "h264_nvenc", "H264;yuv420p;bgr8;bgr8", "avc1"):
        assert codec_of(name) == "h264"
    assert {codec_of(name) for name in ("h265", "hevc_nvenc", "libx265")} == {"hevc"}
    for name in ("vp9", "av1", "", "jpeg"):
        with pytest.raises(EncodingError, match=f"format '{name}': expected h264 or h265"):
            codec_of(name)
    packet = VideoPacket(encode(source_pictures(1), "libx264")[0], "h264", 1, "eye")
    monkeypatch.setattr(av, "__version__", "16.1.0")
    with pytest.raises(EncodingError, match=r"PyAV 17 or newer: pip install -U av \(this is 16\.1\.0\)"):
        VideoDecoder().decode(packet)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(EncodingError, match="h264 video needs PyAV 17 or newer: pip install -U av"):
        VideoDecoder().decode(packet)
