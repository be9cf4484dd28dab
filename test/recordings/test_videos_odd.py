# SPDX-License-Identifier: Apache-2.0
"""Videos of television, of raw streams and cut out of longer ones."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from deq_flow_ros.recordings import MediaError, open_source


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
