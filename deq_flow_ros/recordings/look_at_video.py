# SPDX-License-Identifier: Apache-2.0
"""What OpenCV does not tell of a video file, from FFmpeg through PyAV."""

from __future__ import annotations

from pathlib import Path

from deq_flow_ros.imaging.frame import MediaError


def look_at_video(path: Path) -> tuple[float, str]:
    """At which time a video starts, in s, and a word for people if its rate is only assumed.

    Without PyAV (``pip install av``), nothing is known of it.

    :raises MediaError: if its frames are interlaced. Each is of two times then, and OpenCV 5 fills them with whatever
        lies in its memory.
    """
    try:
        import av  # not at the top: it takes 50 ms, and no rosdep key installs it
    except ImportError:
        return 0.0, ""
    try:
        with av.open(str(path.absolute())) as container:
            start_s = (container.start_time or 0) * 1e-6
            untimed = container.format.name in ("h264", "hevc", "m4v", "mjpeg")
            frame = next(container.decode(video=0), None)
    except (av.error.FFmpegError, IndexError):
        return 0.0, ""
    if frame is not None and frame.interlaced_frame:
        raise MediaError(
            f"the frames of {path} are interlaced: every second line is of another time, so that they show no motion "
            "as it was. Make whole frames of it first: ffmpeg -i INPUT -vf yadif OUTPUT.mp4"
        )
    return max(0.0, start_s), ", which is assumed (it has no times)" if untimed else ""
