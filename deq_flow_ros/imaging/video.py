# SPDX-License-Identifier: Apache-2.0
"""Decoding of H.264 and H.265 packets, one picture each, by FFmpeg through PyAV.

A picture is either right or missing. FFmpeg hides what is lost: it puts another picture in the place of a missing one
of H.264, and marks neither this one nor those that are predicted from it. But H.264 numbers the pictures that others
refer to, so that a gap can be seen. A picture of H.265 lists those that it needs, which FFmpeg checks. Sections are
those of ITU-T H.264 (08/2024).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.imaging.encodings import MAX_PIXELS, EncodingError

H264, H265 = "h264", "hevc"  # as FFmpeg names them
START = b"\x00\x00\x00\x01"
_SPS, _PPS, _IDR = 7, 8, 5
_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # profiles that tell it (7.3.2.1.1)


def nal_units(data: bytes) -> list[bytes]:
    """The NAL units of a byte stream, without the start codes before them (Annex B)."""
    return [unit for part in data.split(b"\x00\x00\x01")[1:] if len(unit := part.rstrip(b"\x00")) > 2]


def kind(unit: bytes, codec: str) -> int:
    """``nal_unit_type``."""
    return unit[0] & 31 if codec == H264 else unit[0] >> 1 & 63


def is_key(data: bytes, codec: str) -> bool:
    """Whether decoding can begin with a packet: it holds an IDR picture of H.264, or an IRAP picture of H.265."""
    return any(kind(unit, codec) in ((_IDR,) if codec == H264 else range(16, 22)) for unit in nal_units(data))


def pictures(data: bytes, codec: str) -> list[list[bytes]]:
    """The NAL units of a packet, picture by picture; one list where there are only parameter sets, none without any."""
    found: list[list[bytes]] = []
    before: list[bytes] = []
    for unit in nal_units(data):
        before.append(unit)
        if _is_slice(unit, codec):
            # ``first_mb_in_slice`` is 0, or ``first_slice_segment_in_pic_flag`` is set.
            if unit[1 if codec == H264 else 2] & 0x80 or not found:
                found.append([])
            found[-1] += before
            before = []
    return [*found[:-1], found[-1] + before] if found else [before] if before else []


def _is_slice(unit: bytes, codec: str) -> bool:
    return kind(unit, codec) in (1, 2, _IDR) if codec == H264 else kind(unit, codec) < 32


class FrameNumbers:
    """Follows ``frame_num`` (7.4.3) through an H.264 stream, to find that pictures are missing which others need."""

    def __init__(self) -> None:
        self._spans: dict[int, tuple[int, bool, bool]] = {}  # see ``_sequence``
        self._sequences: dict[int, int] = {}  # sequence parameter set by picture parameter set
        self.forget()

    def forget(self) -> None:
        """Take the next picture whatever its number is."""
        self._last: tuple[int, bool] | None = None

    def gap(self, units: list[bytes]) -> str | None:
        """Why pictures are missing before one; None where none is. Damaged units raise ``EncodingError``."""
        for unit in units:
            if kind(unit, H264) == _SPS:
                self._spans.update([_sequence(unit)])
            elif kind(unit, H264) == _PPS:
                bits = _Bits(unit)
                self._sequences[bits.ue()] = bits.ue()
            if not _is_slice(unit, H264):
                continue
            bits = _Bits(unit[:40])
            bits.ue(), bits.ue()  # first_mb_in_slice, slice_type
            span = self._spans.get(self._sequences.get(bits.ue(), -1))
            if span is None:  # the decoder will refuse it
                return None
            width, gaps_allowed, separate = span
            bits.u(2 if separate else 0)
            number, used = bits.u(width), bool(unit[0] & 0x60)  # nal_ref_idc: whether others refer to it
            last, last_used = self._last or (number, used)
            begins, self._last = self._last is None, (number if used else last, used)
            if begins or gaps_allowed or kind(unit, H264) == _IDR or number == (last + 1) % (1 << width):
                return None
            return None if number == last and not (used and last_used) else f"frame number {number} follows {last}"
        return None


def _sequence(unit: bytes) -> tuple[int, tuple[int, bool, bool]]:
    """Number of an SPS; its bits of ``frame_num``, whether gaps are allowed and planes are separate (7.3.2.1.1)."""
    profile, bits = unit[1], _Bits(unit, 32)
    number, separate = bits.ue(), False
    if profile in _WITH_CHROMA:
        chroma = bits.ue()
        separate = chroma == 3 and bool(bits.u(1))
        bits.ue(), bits.ue(), bits.u(1)  # depths of luma and chroma, lossless
        if bits.u(1):
            for matrix in range(12 if chroma == 3 else 8):
                bits.skip_scaling_list(16 if matrix < 6 else 64) if bits.u(1) else None
    width = bits.ue() + 4
    order = bits.ue()  # pic_order_cnt_type
    if order == 1:
        bits.u(1), bits.ue(), bits.ue()
        for _ in range(min(bits.ue(), 255)):
            bits.ue()
    elif order == 0:
        bits.ue()
    bits.ue()  # max_num_ref_frames
    return number, (width, bool(bits.u(1)), separate)


class _Bits:
    """Reads the payload of a NAL unit bit by bit."""

    def __init__(self, unit: bytes, skip: int = 8) -> None:
        payload = unit.replace(b"\x00\x00\x03", b"\x00\x00")  # emulation prevention (7.4.1)
        self._bits, self._place = "".join(f"{byte:08b}" for byte in payload), skip

    def u(self, count: int) -> int:
        begin, self._place = self._place, self._place + count
        if self._place > len(self._bits):
            raise EncodingError("parameter sets or slice headers are damaged: they end early")
        return int(self._bits[begin : self._place] or "0", 2)

    def ue(self) -> int:
        """Exp-Golomb code (9.1); signed ones are as long."""
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def skip_scaling_list(self, size: int) -> None:
        last = following = 8  # 7.3.2.1.1.1
        for _ in range(size):
            if following:
                code = self.ue()
                following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
            last = following or last


_CODECS = {H264: ("264", "avc"), H265: ("265", "hevc")}  # in "h264", "libx264", "h264_nvenc", "hevc_vaapi", ...
LEAST_PYAV = 17  # which has FFmpeg 8, which knows that a picture of H.265 lacks one that it needs
NO_KEY_FRAME = "no key frame yet"
INTERLACED = "its frames are interlaced: every second line is of another time, so that they show no motion as it was"


class VideoPacket(NamedTuple):
    """One message of a video, by codec or encoder, and with its number in the stream where there are numbers."""

    data: bytes
    format: str
    stamp_ns: int
    frame_id: str
    number: int | None = None


def packet_of(message: Any) -> VideoPacket:
    """What a message holds, whether it comes from ROS or from a recording."""
    data, header = bytes(message.data), getattr(message, "header", None)
    if header is None:
        return VideoPacket(data, message.format, stamp_to_ns(message.timestamp), message.frame_id)
    return VideoPacket(data, message.encoding, stamp_to_ns(header.stamp), header.frame_id, message.pts)


class Picture(NamedTuple):
    """A decoded picture, which becomes RGB when it is wanted."""

    frame: Any

    def rgb(self) -> np.ndarray:
        """(H, W, 3) uint8, contiguous, by the matrix and range that the stream states, or BT.601 in limited range."""
        # One thread: with several, it takes four times the processor time.
        return self.frame.reformat(format="rgb24", threads=1).to_ndarray()


def codec_of(format: str) -> str:
    """The codec of a format; pixel formats may follow behind semicolons. Others than ours raise ``EncodingError``."""
    name = format.partition(";")[0].strip().lower()
    codec = next((codec for codec, words in _CODECS.items() if any(word in name for word in words)), None)
    if codec is None:
        wanted = "h264 or h265, in which lost packets can be recognised"
        raise EncodingError(f"cannot decode video of format {format!r}: expected {wanted}")
    return codec


def import_pyav(what: str) -> Any:
    """The module ``av``, not imported at the top: it takes 50 ms, and no rosdep key installs it.

    :raises EncodingError: if it is missing, or too old to decode ``what``.
    """
    try:
        import av

        if int(av.__version__.partition(".")[0]) >= LEAST_PYAV:
            return av
        got = f"this is {av.__version__}"
    except ImportError as error:
        got = str(error)
    raise EncodingError(f"decoding {what} needs PyAV {LEAST_PYAV} or newer: pip install -U av ({got})")


class VideoDecoder:
    """Decodes the packets of one topic, in the order in which they come."""

    def __init__(self) -> None:
        self._codec, self._count, self._numbered = "", 0, False
        self._context: Any = None
        self._numbers = FrameNumbers()
        self._last: VideoPacket | None = None
        self._waits: str | None = NO_KEY_FRAME  # why pictures are not usable before the next key frame

    def decode(self, packet: VideoPacket, lost: str = "") -> Picture:
        """The picture of a packet; of several in it, the last one.

        :param lost: what is known to have been lost before it, if anything is: "a packet was lost".
        :raises EncodingError: naming why there is none. The next packet is to be decoded nevertheless.
        """
        if (codec := codec_of(packet.format)) != self._codec:
            self._open(codec)
        if packet == self._last:
            raise EncodingError("the same packet as the one before")
        gap = self._gap_before(packet)
        if lost or gap:
            self._restart(lost or gap)
        found = pictures(packet.data, codec)
        if not found:
            got = f"{len(packet.data)} bytes: {packet.data[:8].hex(' ') or '-'}"
            raise EncodingError(f"expected {codec} data with start codes (Annex B), got {got}")
        picture = [self._picture(units) for units in found][-1]
        if picture is None:
            sets_alone = not any(_is_slice(unit, codec) for unit in found[-1])
            why = "the packet holds no picture, only parameter sets" if sets_alone else self._waits
            raise EncodingError(why or "the packet gave no picture")
        return picture

    def _open(self, codec: str) -> None:
        av = import_pyav(f"{codec} video")
        context = av.CodecContext.create(codec, "r")
        context.thread_count = 1  # threads would delay pictures, and the cores are the solver's
        context.options = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_PIXELS)}
        context.flags |= av.codec.context.Flags.output_corrupt  # marked as such; left out, they would just be late
        self._av, self._context, self._codec = av, context, codec
        self._numbers, self._waits = FrameNumbers(), NO_KEY_FRAME

    def _restart(self, why: str) -> None:
        """Wait for the next key frame."""
        self._context.flush_buffers()
        self._numbers.forget()
        self._waits = self._waits or f"no key frame since {why}"

    def _gap_before(self, packet: VideoPacket) -> str:
        last, self._last = self._last or packet, packet
        if packet.stamp_ns < last.stamp_ns:
            return f"time went back by {(last.stamp_ns - packet.stamp_ns) * 1e-6:.1f} ms"
        if packet.number is None or last.number is None or packet is last:
            return ""
        follows = packet.number == last.number + 1
        self._numbered |= follows  # some number packets by their time, in whatever unit
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
            if any(_is_slice(unit, self._codec) for unit in units):
                self._restart(f"a packet could not be decoded ({getattr(error, 'strerror', None) or error})")
            return None
        if self._context.has_b_frames or any(frame.pts != self._count for frame in frames):
            late = "its pictures come out of order or late (B-frames)"
            raise EncodingError(f"{late}; expected one per packet: encode with max_b_frames 0, or tune zerolatency")
        frame = frames[-1] if frames else None
        if frame is None or frame.is_corrupt:
            # One that is not a key frame may as well be on the way to recovery, by intra refresh.
            if frame is not None and (self._waits is None or frame.key_frame):
                self._restart("a picture was damaged, or lacked one that it needs")
            return None
        if frame.interlaced_frame:
            raise EncodingError(f"{INTERLACED}; expected progressive video")
        self._waits = None
        return Picture(frame)
