# SPDX-License-Identifier: Apache-2.0
"""Decoding of H.264 and H.265 packets, one picture each, by FFmpeg through PyAV.

A picture is either right or missing: where data is lost, FFmpeg would go on with pictures that are smeared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deq_flow_ros.imaging.encodings import MAX_PIXELS, EncodingError
from deq_flow_ros.imaging.frame import stamp_to_ns
from deq_flow_ros.imaging.h264 import H264, H265, START, FrameNumbers, has_picture, pictures

_CODECS = {H264: ("264", "avc"), H265: ("265", "hevc")}
"""What the names of formats and encoders have in common: "h264", "libx264", "h264_nvenc", "hevc_vaapi", ..."""
LEAST_PYAV = 17
"""Major version from which PyAV has FFmpeg 8, which knows that a picture of H.265 lacks one that it needs."""
NO_KEY_FRAME = "no key frame yet"
INTERLACED = "its frames are interlaced: every second line is of another time, so that they show no motion as it was"


@dataclass(frozen=True)
class VideoPacket:
    """One message of a video.

    :ivar format: codec or encoder; with ffmpeg_image_transport, pixel formats may follow behind semicolons.
    :ivar number: of the packet in its stream, by which a lost one is noticed; None where there are no numbers.
    """

    data: bytes
    format: str
    stamp_ns: int
    frame_id: str
    number: int | None = None


def packet_of(message: Any) -> VideoPacket:
    """What a message holds, whether it comes from ROS or from a recording."""
    data = bytes(message.data)
    if hasattr(message, "timestamp"):
        return VideoPacket(data, message.format, stamp_to_ns(message.timestamp), message.frame_id)
    header = message.header
    return VideoPacket(data, message.encoding, stamp_to_ns(header.stamp), header.frame_id, message.pts)


class Picture(NamedTuple):
    """A decoded picture, which becomes RGB when it is wanted."""

    frame: Any

    def rgb(self) -> np.ndarray:
        """(H, W, 3) uint8, contiguous, by the matrix and range that the stream states, or BT.601 in limited range."""
        # One thread: with several, it takes four times the processor time.
        return self.frame.reformat(format="rgb24", threads=1).to_ndarray()


def codec_of(format: str) -> str:
    """The codec of a format.

    :raises EncodingError: for others than H.264 and H.265.
    """
    name = format.partition(";")[0].strip().lower()
    for codec, words in _CODECS.items():
        if any(word in name for word in words):
            return codec
    raise EncodingError(
        f"cannot decode video of format {format!r}: expected h264 or h265, in which lost packets can be recognised"
    )


class VideoDecoder:
    """Decodes the packets of one topic, in the order in which they come."""

    def __init__(self) -> None:
        self._codec = ""
        self._context: Any = None
        self._numbers = FrameNumbers()
        self._count = 0
        self._last: VideoPacket | None = None
        self._numbered = False
        self._waits: str | None = NO_KEY_FRAME
        """Why pictures are not usable before the next key frame; None while they are."""

    def decode(self, packet: VideoPacket, lost: str = "") -> Picture:
        """The picture of a packet; of several in it, the last one.

        :param lost: what is known to have been lost before it, if anything is: "a packet was lost".
        :raises EncodingError: naming why there is none. The next packet is to be decoded nevertheless.
        """
        codec = codec_of(packet.format)
        if codec != self._codec:
            self._open(codec)
        if packet == self._last:
            raise EncodingError("the same packet as the one before")
        gap = self._lost_before(packet)
        if why := lost or gap:
            self._restart(why)
        found = pictures(packet.data, codec)
        if not found:
            begin = packet.data[:8].hex(" ") or "-"
            raise EncodingError(
                f"expected {codec} data with start codes (Annex B), got {len(packet.data)} bytes: {begin}"
            )
        picture = [self._picture(units) for units in found][-1]
        if not has_picture(found[-1], codec):
            raise EncodingError("the packet holds no picture, only parameter sets")
        if picture is None:
            raise EncodingError(self._waits or "the packet gave no picture")
        return picture

    def _open(self, codec: str) -> None:
        try:
            import av  # not at the top: it takes 50 ms, and no rosdep key installs it
        except ImportError as error:
            raise EncodingError(f"decoding {codec} video needs PyAV: pip install av ({error})") from error
        if int(av.__version__.partition(".")[0]) < LEAST_PYAV:
            raise EncodingError(
                f"decoding video needs PyAV {LEAST_PYAV} or newer, got {av.__version__}: pip install -U av"
            )
        context = av.CodecContext.create(codec, "r")
        context.thread_count = 1  # threads would delay pictures, and the cores are the solver's
        context.options = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_PIXELS)}
        context.flags |= av.codec.context.Flags.output_corrupt  # marked as such; left out, they would just be late
        self._av, self._context, self._codec = av, context, codec
        self._numbers = FrameNumbers()
        self._waits = NO_KEY_FRAME

    def _restart(self, why: str) -> None:
        """Wait for the next key frame."""
        self._context.flush_buffers()
        self._numbers.forget()
        self._waits = self._waits or f"no key frame since {why}"

    def _lost_before(self, packet: VideoPacket) -> str:
        last, self._last = self._last, packet
        if last is None:
            return ""
        if packet.stamp_ns < last.stamp_ns:
            return f"time went back by {(last.stamp_ns - packet.stamp_ns) * 1e-6:.1f} ms"
        if packet.number is None or last.number is None:
            return ""
        # Some number packets by their time, in whatever unit.
        follows = packet.number == last.number + 1
        self._numbered |= follows
        return "" if follows or not self._numbered else f"packet {packet.number} followed {last.number}"

    def _picture(self, units: list[bytes]) -> Picture | None:
        """Decode one; None where it is not usable."""
        try:
            if self._codec == H264 and (gap := self._numbers.gap(units)) is not None:
                self._restart(f"packets were lost ({gap})")
            self._count += 1
            packet = self._av.Packet(START + START.join(units))
            packet.pts = self._count
            frames = self._context.decode(packet)
        except (self._av.error.FFmpegError, EncodingError) as error:
            if has_picture(units, self._codec):
                self._restart(f"a packet could not be decoded ({getattr(error, 'strerror', None) or error})")
            return None
        if self._context.has_b_frames or any(frame.pts != self._count for frame in frames):
            raise EncodingError(
                "its pictures come out of order or late (B-frames); expected one picture per packet: encode with "
                "max_b_frames 0, or tune zerolatency"
            )
        if not frames:
            return None
        if frames[-1].is_corrupt:
            # One that is not a key frame may as well be on the way to recovery, by intra refresh.
            if self._waits is None or frames[-1].key_frame:
                self._restart("a picture was damaged, or lacked one that it needs")
            return None
        if frames[-1].interlaced_frame:
            raise EncodingError(f"{INTERLACED}; expected progressive video")
        self._waits = None
        return Picture(frames[-1])
