# SPDX-License-Identifier: Apache-2.0
"""What the bytes of H.264 and H.265 packets tell without decoding them: their pictures, key frames, and lost packets.

Decoders hide what is lost: FFmpeg puts another picture in the place of a missing one of H.264, and marks neither this
one nor those that are predicted from it. But H.264 numbers the pictures that others refer to, so that a gap can be
seen. A picture of H.265 lists those that it needs, which FFmpeg checks. Sections are those of ITU-T H.264 (08/2024).
"""

from __future__ import annotations

from deq_flow_ros.imaging.encodings import EncodingError

H264, H265 = "h264", "hevc"
"""Names of the codecs, as FFmpeg has them."""
START = b"\x00\x00\x00\x01"
_SPS, _PPS, _IDR = 7, 8, 5
# These profiles tell their chroma format (7.3.2.1.1).
_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


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
        if not _is_slice(unit, codec):
            continue
        # ``first_mb_in_slice`` is 0, or ``first_slice_segment_in_pic_flag`` is set.
        if unit[1 if codec == H264 else 2] & 0x80 or not found:
            found.append([])
        found[-1] += before
        before = []
    if found:
        found[-1] += before
    return found or ([before] if before else [])


def has_picture(units: list[bytes], codec: str) -> bool:
    """Whether there is a slice of a picture among NAL units."""
    return any(_is_slice(unit, codec) for unit in units)


def _is_slice(unit: bytes, codec: str) -> bool:
    return kind(unit, codec) in (1, 2, _IDR) if codec == H264 else kind(unit, codec) < 32


class FrameNumbers:
    """Follows ``frame_num`` (7.4.3) through an H.264 stream, to find pictures that are missing.

    Not seen are a loss of a multiple of ``MaxFrameNum`` pictures (16 or more), and one of pictures that no other needs.
    """

    def __init__(self) -> None:
        self._spans: dict[int, tuple[int, bool, bool]] = {}
        """By sequence parameter set: bits of ``frame_num``, whether gaps are allowed, whether planes are separate."""
        self._sequences: dict[int, int] = {}
        """Sequence parameter set by picture parameter set."""
        self.forget()

    def forget(self) -> None:
        """Take the next picture whatever its number is."""
        self._last: int | None = None
        self._last_used = True

    def gap(self, units: list[bytes]) -> str | None:
        """Why pictures are missing before one; None where none is.

        :raises EncodingError: for parameter sets or a slice that end early.
        """
        try:
            for unit in units:
                if kind(unit, H264) == _SPS:
                    number, span = _sequence(unit)
                    self._spans[number] = span
                elif kind(unit, H264) == _PPS:
                    bits = _Bits(unit)
                    self._sequences[bits.ue()] = bits.ue()
                elif _is_slice(unit, H264):
                    return self._gap_before(unit)
        except ValueError as error:
            raise EncodingError(f"parameter sets or slice headers are damaged ({error})") from error
        return None

    def _gap_before(self, unit: bytes) -> str | None:
        bits = _Bits(unit[:40])
        bits.ue(), bits.ue()  # first_mb_in_slice, slice_type
        span = self._spans.get(self._sequences.get(bits.ue(), -1))
        if span is None:  # the decoder will refuse it
            return None
        width, gaps_allowed, separate = span
        bits.u(2 if separate else 0)
        number, used = bits.u(width), bool(unit[0] & 0x60)  # nal_ref_idc: whether others refer to it
        last, last_used, self._last_used = self._last, self._last_used, used
        if used or self._last is None:
            self._last = number
        if kind(unit, H264) == _IDR or last is None or gaps_allowed:
            return None
        if number == (last + 1) % (1 << width) or (number == last and not (used and last_used)):
            return None
        return f"frame number {number} follows {last}"


def _sequence(unit: bytes) -> tuple[int, tuple[int, bool, bool]]:
    """Number of a sequence parameter set, and what ``FrameNumbers`` wants of it (7.3.2.1.1)."""
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
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.u(1), bits.ue(), bits.ue()
        for _ in range(min(bits.ue(), 255)):
            bits.ue()
    bits.ue()  # max_num_ref_frames
    return number, (width, bool(bits.u(1)), separate)


class _Bits:
    """Reads the payload of a NAL unit bit by bit; raises ValueError behind its end."""

    def __init__(self, unit: bytes, skip: int = 8) -> None:
        payload = unit.replace(b"\x00\x00\x03", b"\x00\x00")  # emulation prevention (7.4.1)
        self._bits, self._place = "".join(f"{byte:08b}" for byte in payload), skip

    def u(self, count: int) -> int:
        """Unsigned, of ``count`` bits."""
        begin, self._place = self._place, self._place + count
        if self._place > len(self._bits):
            raise ValueError("it ends early")
        return int(self._bits[begin : self._place] or "0", 2)

    def ue(self) -> int:
        """Exp-Golomb code (9.1); signed ones are as long."""
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def skip_scaling_list(self, size: int) -> None:
        """7.3.2.1.1.1."""
        last = following = 8
        for _ in range(size):
            if following:
                code = self.ue()
                following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
            last = following or last
