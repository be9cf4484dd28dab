# SPDX-License-Identifier: Apache-2.0
"""Videos of television, of raw streams and cut out of longer ones."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from deq_flow_ros.recordings import MediaError, open_source
from deq_flow_ros.recordings.source import MOST_B


def test_a_video_says_what_its_frames_and_times_are(tmp_path: Path) -> None:
    """OpenCV 5 makes garbage of interlaced frames; a raw stream has no times; a part of another starts late."""
    for name, options, first_ms in (
        ("tv.mp4", {"flags": "+ildct+ilme", "x264-params": "interlaced=1"}, 0),
        ("raw.h264", {}, 0),
        ("cut.mkv", {}, 9000),
    ):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={**options, "tune": "zerolatency"})
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for number in range(3):
                image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * number, np.uint8), format="bgr24")
                image.pts, image.time_base = first_ms + 40 * number, Fraction(1, 1000)
                container.mux(stream.encode(image))
            container.mux(stream.encode(None))
    with pytest.raises(MediaError, match=r"interlaced: .* yadif"):
        open_source(tmp_path / "tv.mp4")
    assert "at 25 Hz, which is assumed (it has no times)" in open_source(tmp_path / "raw.h264").description
    cut = open_source(tmp_path / "cut.mkv")
    assert len(list(cut.frames())) == 3 and not cut.skipped, "it is not truncated"


def test_a_video_whose_rate_is_not_constant_is_not_called_truncated(tmp_path: Path) -> None:
    """Matroska and WebM do not count frames, and OpenCV's number of them is a guess from length and rate."""
    times = [0, 33, 43, 76, 186, 286, 386, 486, 519, 639]
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=30, width=64, height=48, pix_fmt="bgr0")
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, ms in enumerate(times):
            one = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), "bgr24")
            one.pts, one.time_base = ms, Fraction(1, 1000)
            container.mux(stream.encode(one))
        container.mux(stream.encode())
    source = open_source(tmp_path / "v.mkv")
    stamps = [(frame.stamp_ns - 1_000_000_000) // 1_000_000 for frame in source.frames()]
    assert stamps == times and source.skipped == [] and "about" in source.description
    whole = (tmp_path / "v.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    source = open_source(tmp_path / "cut.mkv")
    assert 0 < len(list(source.frames())) < 10 and "states a length of 0.7 s, only 0." in source.skipped[0]


def encoded(codec: str, size: tuple[int, int], numbers: range, **options: str) -> list[bytes]:
    """A packet for each number: noise that is shifted by it. The first is a key frame."""
    context = av.CodecContext.create(codec, "w")
    (context.width, context.height), context.time_base = size, Fraction(1, 30)
    context.pix_fmt, context.max_b_frames = "yuvj420p" if codec == "mjpeg" else "yuv420p", 0
    context.options = {"tune": "zerolatency", **options} if codec == "libx264" else {}
    noise = np.random.default_rng(0).integers(0, 200, (size[1], size[0], 3), np.uint8)
    pictures = (av.VideoFrame.from_ndarray(np.roll(noise, 2 * n, axis=1), "bgr24") for n in numbers)
    return [bytes(packet) for picture in (*pictures, None) for packet in context.encode(picture)]


def written(path: Path, codec: str, packets: list[bytes], keys: tuple[int, ...] = (0,)) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, width=64, height=48)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 30), stream, number in keys
            container.mux(packet)
    return path


def test_pictures_of_a_video_keep_their_size_where_it_changes(tmp_path: Path) -> None:
    """OpenCV stretches them to the size of the others: the flow between them would be too long, and nothing said."""
    packets = encoded("libx264", (64, 48), range(3)) + encoded("libx264", (96, 80), range(3))
    raw = tmp_path / "raw.h264"
    raw.write_bytes(b"".join(packets))
    for path in (raw, written(tmp_path / "v.mkv", "libx264", packets, (0, 3))):
        sizes = [(frame.width, frame.height) for frame in open_source(path).frames()]
        assert sizes == 3 * [(64, 48)] + 3 * [(96, 80)]


@pytest.mark.parametrize(("codec", "after"), [("libx264", 3), ("mpeg4", 3), ("mjpeg", 1)])
def test_a_damaged_picture_of_a_video_is_named_and_none_is_smeared(tmp_path: Path, codec: str, after: int) -> None:
    """Decoders hide damage by pieces of other pictures, which move. What follows is made of it up to a key frame."""
    packets = encoded(codec, (64, 48), range(3)) + encoded(codec, (64, 48), range(3, 6))
    whole = [frame.data for frame in open_source(written(tmp_path / "v.avi", codec, packets, (0, 3))).frames()]
    middle = len(packets[1]) // 2
    packets[1] = packets[1][:middle] + 16 * b"\xff\x00" + packets[1][middle + 32 :]
    source = open_source(written(tmp_path / "d.avi", codec, packets, (0, 3)))
    frames = {round((frame.stamp_ns - 10**9) * 30e-9): frame for frame in source.frames()}
    left = [number for number, frame in frames.items() if not frame.problem]
    assert left == ([0, 3, 4, 5] if after == 3 else [0, 2, 3, 4, 5])
    assert all(np.array_equal(frames[number].data, whole[number]) for number in left)
    assert "is damaged" in "".join(source.skipped + [frame.problem for frame in frames.values()])


def test_a_video_of_b_pictures_alone_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware may write H.265 without P-pictures, where a picture that is none of B may never come; here P is B."""
    path = written(tmp_path / "v.mkv", "libx264", encoded("libx264", (64, 48), range(60), sc_threshold="0"))
    monkeypatch.setattr(av.video.frame, "PictureType", SimpleNamespace(B=av.video.frame.PictureType.P))
    decoded = open_source(path)._decoded()
    held = [len(decoded.gi_frame.f_locals["run"]) for _ in decoded]
    assert len(held) == 60 and max(held) <= MOST_B + 1
