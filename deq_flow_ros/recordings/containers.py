# SPDX-License-Identifier: Apache-2.0
"""MCAP files and ROS 1 bags, read from the front record by record; the index at their end only counts.

So unfinished and damaged files are read as whole ones are, and MCAP files with more in them than ROS 2 messages.
Formats: https://mcap.dev/spec and https://wiki.ros.org/Bags/Format/2.0.
"""

from __future__ import annotations

import bz2
import contextlib
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

import lz4.frame

from deq_flow_ros.recordings.files import MCAP_MAGIC, ROS1_MAGIC

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LARGEST_RECORD = 1 << 30
"""A record that claims more bytes is damaged."""


class Channel(NamedTuple):
    """The topic and type of messages, as a file describes them once.

    :ivar msgtype: such as "sensor_msgs/msg/Image"; for messages that are not from ROS, their name and encoding.
    :ivar ros1: whether messages are serialized as in ROS 1, not as CDR.
    """

    topic: str
    msgtype: str
    ros1: bool = False


Stored = tuple[Channel, int, bytes]
"""Where a message comes from, when it was recorded in ns, and its bytes, which may be compressed."""


class Damage(Exception):
    """Something cannot be read at this place; the message says what."""


def count_messages(path: Path) -> Counter[Channel] | None:
    """Number of messages, as the index of a file has them; None where there is none that can be used."""
    with contextlib.suppress(Damage), path.open("rb") as file:
        return _container(file).counts
    return None


def messages(path: Path, note: Callable[[str], None]) -> Iterator[Stored]:
    """Those of a file in the order in which they lie there.

    :param note: hears of chunks and records that cannot be read.
    :raises Damage: where the file breaks off.
    """
    with path.open("rb") as file:
        container = _container(file)
        for record in container.records(file):
            if record.kind == container.END:
                return
            chunk = record.kind == container.CHUNK
            try:
                for inner in container.records(BytesIO(container.unpacked(record))) if chunk else [record]:
                    if inner.whole and (stored := container.content(inner)) is not None:
                        yield stored
                    elif not inner.whole and record.whole:
                        raise Damage("it holds a record that is longer than itself")
            except Exception as error:  # each compression has errors of its own
                why = f"{type(error).__name__}: {error}" if isinstance(error, (struct.error, KeyError)) else error
                what = f"{'chunk' if chunk else 'record'} of {len(record.body)} bytes"
                note(f"a {what} before byte {file.tell()} cannot be read ({why})")
            if not record.whole:
                break
        else:
            if container.END is None:
                return
        raise Damage(f"it breaks off after byte {file.tell()}")


class _Record(NamedTuple):
    kind: int
    fields: dict[str, bytes]
    body: bytes
    whole: bool


class _Channels(dict[int, Channel]):
    def __missing__(self, number: int) -> Channel:
        raise Damage("nothing says to which topic it belongs")


def _container(file: BinaryIO) -> _Mcap | _Ros1:
    """Knows the channels of the index, because those at the beginning may be damaged; the file is behind its magic."""
    magic = file.read(len(ROS1_MAGIC))
    container = _Mcap() if magic.startswith(MCAP_MAGIC) else _Ros1() if magic == ROS1_MAGIC else None
    if container is None:
        raise Damage("it is not a bag (MCAP, SQLite or ROS 1), or its beginning is lost" if magic else "it is empty")
    with contextlib.suppress(Exception):
        numbers = container.read_index(file, file.seek(0, SEEK_END))
        counts = Counter[Channel]()
        for number, channel in container.channels.items():
            counts[channel] += numbers.pop(number, 0)
        container.counts = None if numbers else counts
    file.seek(len(container.MAGIC))
    return container


class _Mcap:
    MAGIC, CHUNK, END = MCAP_MAGIC, 0x06, 0x0F
    counts: Counter[Channel] | None = None

    def __init__(self) -> None:
        self._schemas: dict[int, tuple[str, str]] = {}
        self.channels = _Channels()

    def read_index(self, file: BinaryIO, size: int) -> dict[int, int]:
        file.seek(size - 37)  # the last record and the magic bytes
        start, _, checksum = struct.unpack("<QQI", next(self.records(file)).body)
        file.seek(start or size)
        numbers = None
        for record in self.records(file):
            if record.whole and record.kind in (0x03, 0x04):
                self.content(record)
            elif record.kind == 0x0B:
                numbers = dict(struct.iter_unpack("<HQ", record.body[46:]))
                if sum(numbers.values()) != struct.unpack_from("<Q", record.body)[0]:
                    raise Damage("its counts contradict each other")
        file.seek(start)
        if numbers is None or (checksum and crc32(file.read(size - 12 - start)) != checksum):
            raise Damage("it has no counts, or its checksum is wrong")
        return numbers

    def records(self, file: BinaryIO) -> Iterator[_Record]:
        while len(head := file.read(9)) == 9:
            if not head[0]:
                raise Damage(f"there is no record at byte {file.tell() - 9}")
            body = file.read(size := _size(head[1:], file))
            yield _Record(head[0], {}, body, len(body) == size)

    def unpacked(self, chunk: _Record) -> bytes:
        size, checksum = struct.unpack_from("<QI", chunk.body, 16)
        compression, place = _text(chunk.body, 28)
        data = _unpacked(chunk.body[place + 8 :], compression, size, chunk.whole)
        if chunk.whole and checksum and crc32(data) != checksum:
            raise Damage("its checksum is wrong")
        return data

    def content(self, record: _Record) -> Stored | None:
        kind, body = record.kind, record.body
        if kind == 0x03:
            name, place = _text(body, 2)
            self._schemas[int.from_bytes(body[:2], "little")] = name, _text(body, place)[0]
        elif kind == 0x04:
            number, schema = struct.unpack_from("<HH", body)
            topic, place = _text(body, 4)
            name, language = self._schemas.get(schema, ("", ""))
            form = _text(body, place)[0]
            ros = form in ("cdr", "ros1") and name
            msgtype = _ros_type(name) if ros else f"{name or 'data'} in {language or form or 'an unknown form'}"
            self.channels[number] = Channel(topic, msgtype, bool(ros) and form == "ros1")
        elif kind == 0x05:
            number, _, time_ns, _ = struct.unpack_from("<HIQQ", body)
            return self.channels[number], time_ns, body[22:]
        elif 0x10 <= kind < 0x80:  # from there on, everybody may have own ones
            raise Damage(f"it is of an unknown kind, {kind:#x}")
        return None


class _Ros1:
    MAGIC, CHUNK, END = ROS1_MAGIC, 0x05, None
    counts: Counter[Channel] | None = None

    def __init__(self) -> None:
        self.channels = _Channels()

    def read_index(self, file: BinaryIO, size: int) -> dict[int, int]:
        file.seek(len(self.MAGIC))
        header = next(self.records(file)).fields
        place, connections, chunks = (_number(header[name]) for name in ("index_pos", "conn_count", "chunk_count"))
        file.seek(place or size)
        kinds, numbers = Counter[int](), Counter[int]()
        for record in self.records(file):
            kinds[record.kind] += 1
            if record.kind == 0x07:
                self.content(record)
            elif record.kind == 0x06:
                for number, count in struct.iter_unpack("<II", record.body):
                    numbers[number] += count
        if kinds != {0x07: connections, 0x06: chunks}:
            raise Damage("its index is not whole")
        return numbers

    def records(self, file: BinaryIO) -> Iterator[_Record]:
        while head := file.read(4):
            if not any(head):
                raise Damage(f"there is no record at byte {file.tell() - len(head)}")
            header = body = b""
            whole = len(head) == 4 and len(header := file.read(_size(head, file))) == _number(head)
            if whole and (whole := len(head := file.read(4)) == 4):
                whole = len(body := file.read(_size(head, file))) == _number(head)
            fields = _ros1_fields(header)
            yield _Record(_number(fields.get("op", b"")), fields, body, whole)

    def unpacked(self, chunk: _Record) -> bytes:
        compression = chunk.fields.get("compression", b"").decode(errors="replace")
        return _unpacked(chunk.body, compression, _number(chunk.fields.get("size", b"")), chunk.whole)

    def content(self, record: _Record) -> Stored | None:
        fields, number = record.fields, _number(record.fields.get("conn", b""))
        if record.kind == 0x07:
            topic, name = fields.get("topic", b""), _ros1_fields(record.body).get("type", b"")
            msgtype = _ros_type(name.decode(errors="replace"))
            self.channels[number] = Channel(topic.decode(errors="replace"), msgtype, ros1=True)
        elif record.kind == 0x02:
            seconds, nanoseconds = struct.unpack("<II", fields["time"])
            return self.channels[number], seconds * 1_000_000_000 + nanoseconds, record.body
        elif record.kind not in (0x03, 0x04, 0x06):
            raise Damage(f"it is of an unknown kind, {record.kind:#x}")
        return None


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _size(head: bytes, file: BinaryIO) -> int:
    """The size that a record begins with, just read."""
    if (size := _number(head)) > LARGEST_RECORD:
        raise Damage(f"there is no record at byte {file.tell() - len(head)}")
    return size


def _text(body: bytes, place: int) -> tuple[str, int]:
    """A string with its length before it, and where it ends."""
    end = place + 4 + _number(body[place : place + 4])
    return body[place + 4 : end].decode(errors="replace"), end


def _ros1_fields(data: bytes) -> dict[str, bytes]:
    fields, place = {}, 0
    while place + 4 <= len(data):
        end = place + 4 + _number(data[place : place + 4])
        name, _, value = data[place + 4 : end].partition(b"=")
        fields[name.decode(errors="replace")] = value
        place = end
    return fields


def _ros_type(name: str) -> str:
    """The ROS 2 name of a message type: "sensor_msgs/msg/Image" for ROS 1's "sensor_msgs/Image"."""
    package, _, message = name.rpartition("/")
    return name if not package or "/" in package else f"{package}/msg/{message}"


def _unpacked(data: bytes, compression: str, size: int, whole: bool) -> bytes:
    """What a chunk of a stated size holds; of one that is not all there, as much as comes out."""
    if compression in ("", "none"):
        return data
    unpackers = {"zstd": zstd.ZstdDecompressor, "lz4": lz4.frame.LZ4FrameDecompressor, "bz2": bz2.BZ2Decompressor}
    if compression not in unpackers:
        raise Damage(f"its compression is {compression!r}, expected {', '.join(unpackers)} or none")
    unpacker = unpackers[compression]()
    # Given how much there is, zstd is eight times as fast. A limit lets no damaged size take all memory.
    content = unpacker.decompress(data, min(size, LARGEST_RECORD))
    if whole and not (unpacker.eof and len(content) == size):
        raise Damage(f"it holds {len(content)} bytes, or more, and not the {size} that it states")
    return content
