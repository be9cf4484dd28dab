# SPDX-License-Identifier: Apache-2.0
"""What can be read of damaged and unfinished bag files: from the front, record by record, without any index.

Formats: https://mcap.dev/spec, https://wiki.ros.org/Bags/Format/2.0, and the tables of rosbag2_storage_sqlite3.
"""

from __future__ import annotations

import bz2
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import apsw
import lz4.frame

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MCAP_MAGIC, ROS1_MAGIC, SQLITE_MAGIC = b"\x89MCAP0\r\n", b"#ROSBAG V2.0\n", b"SQLite format 3\0"
LARGEST_RECORD = 1 << 30
"""A record that claims more bytes is damaged."""


class Salvaged(NamedTuple):
    """A message that was found; `raw` as it is in the file, CDR or ROS 1's own form."""

    topic: str
    msgtype: str
    time_ns: int
    raw: bytes


class Damage(Exception):
    """Here something cannot be read; the message says what."""


def salvage(path: Path, note: Callable[[str], None]) -> Iterator[Salvaged]:
    """The messages of a bag file in the order in which they lie there, up to where it breaks off.

    :param note: hears what cannot be read, a phrase each: "it breaks off after 1.2 MB".
    """
    with path.open("rb") as file:
        magic = file.read(16)
        file.seek(0)
        try:
            if magic.startswith(MCAP_MAGIC):
                yield from _mcap(file, note)
            elif magic.startswith(ROS1_MAGIC):
                yield from _ros1(file, note)
            elif magic.startswith(SQLITE_MAGIC):
                yield from _sqlite3(path)
            elif not magic:
                raise Damage("it is empty")
            else:
                raise Damage("it is no bag: neither MCAP nor SQLite nor ROS 1, or its beginning is lost")
        except Damage as damage:
            note(str(damage))


def _mcap(file: BinaryIO, note: Callable[[str], None]) -> Iterator[Salvaged]:
    file.seek(len(MCAP_MAGIC))
    topics: dict[int, tuple[str, str]] = {}
    schemas: dict[int, str] = {}
    while (head := file.read(9)) != MCAP_MAGIC:
        kind, body, missing = _mcap_record(head, file)
        if kind == 0x0F:  # the end of the data; what follows is its index
            return
        if kind == 0x06:
            try:
                yield from _mcap_chunk(body, schemas, topics, whole=not missing)
            except Exception as error:  # each compression has errors of its own
                note(f"a chunk of {len(body)} bytes before byte {file.tell()} cannot be read ({error})")
        elif not missing:
            yield from _mcap_content(kind, body, schemas, topics)
        if missing:
            raise Damage(f"it breaks off after byte {file.tell()}")


def _mcap_record(head: bytes, file: BinaryIO) -> tuple[int, bytes, int]:
    """Its kind, its content, and how many bytes of that are missing."""
    if len(head) < 9:
        raise Damage(f"it breaks off after byte {file.tell()}")
    size = int.from_bytes(head[1:], "little")
    if size > LARGEST_RECORD:
        raise Damage(f"there is no record at byte {file.tell() - len(head)}")
    body = file.read(size)
    return head[0], body, size - len(body)


def _mcap_chunk(
    body: bytes, schemas: dict[int, str], topics: dict[int, tuple[str, str]], whole: bool
) -> Iterator[Salvaged]:
    checksum = int.from_bytes(body[24:28], "little")
    compression, place = _text(body, 28)
    data = _unpacked(body[place + 8 :], compression, whole)
    if whole and checksum and crc32(data) != checksum:
        raise Damage("its checksum does not fit")
    place = 0
    # A chunk that is not all there may end in the middle of a message.
    while (start := place + 9) + (size := int.from_bytes(data[place + 1 : start], "little")) <= len(data):
        yield from _mcap_content(data[place], data[start : start + size], schemas, topics)
        place = start + size


def _mcap_content(
    kind: int, body: bytes, schemas: dict[int, str], topics: dict[int, tuple[str, str]]
) -> Iterator[Salvaged]:
    if kind == 0x03:
        schemas[int.from_bytes(body[:2], "little")] = _text(body, 2)[0]
    elif kind == 0x04:
        channel, schema = struct.unpack_from("<HH", body)
        topics[channel] = _text(body, 4)[0], schemas.get(schema, "")
    elif kind == 0x05:
        channel, _, time_ns = struct.unpack_from("<HIQ", body)
        if channel in topics:
            yield Salvaged(*topics[channel], time_ns, body[22:])


def _unpacked(data: bytes, compression: str, whole: bool) -> bytes:
    """What a chunk holds; of one that is not all there, as much as comes out."""
    if compression in ("", "none"):
        return data
    unpackers = {"zstd": zstd.ZstdDecompressor, "lz4": lz4.frame.LZ4FrameDecompressor, "bz2": bz2.BZ2Decompressor}
    if compression not in unpackers:
        raise Damage(f"unknown compression {compression!r}, expected {', '.join(unpackers)} or none")
    unpacker = unpackers[compression]()
    unpacked = unpacker.decompress(data)
    if whole and not unpacker.eof:
        raise Damage("it ends early")
    return unpacked


def _text(body: bytes, place: int) -> tuple[str, int]:
    """A string with its length before it, and where it ends."""
    end = place + 4 + int.from_bytes(body[place : place + 4], "little")
    return body[place + 4 : end].decode(errors="replace"), end


def _sqlite3(path: Path) -> Iterator[Salvaged]:
    vfs = _Patient()
    try:
        # Immutable: nothing is written beside a recording, and no lock is asked for.
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        connection = apsw.Connection(f"{path.resolve().as_uri()}?immutable=1", flags, vfs=vfs.name)
    except apsw.Error as error:
        raise Damage(f"SQLite cannot read it ({error})") from error
    try:
        topics = {row[0]: (row[1], row[2]) for row in connection.execute("SELECT id, name, type FROM topics")}
        # In the order of the rows: an index by time may be damaged where the messages are not.
        for topic, time_ns, raw in connection.execute("SELECT topic_id, timestamp, data FROM messages NOT INDEXED"):
            if topic in topics and isinstance(raw, bytes):
                yield Salvaged(*topics[topic], time_ns, raw)
    except apsw.Error as error:
        raise Damage(f"SQLite cannot read further ({error})") from error
    finally:
        connection.close()


class _Patient(apsw.VFS):
    """Files as SQLite expects them: as long as their header says. SQLite reads no file at all that is shorter; so it
    learns what is missing only when it wants to read it.
    """

    name = "patient"

    def __init__(self) -> None:
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _PatientFile("", name, flags)


class _PatientFile(apsw.VFSFile):
    def xFileSize(self) -> int:
        header = super().xRead(100, 0)
        page = int.from_bytes(header[16:18], "big")
        # Of pages of 65536 bytes, the header says 1.
        return max(super().xFileSize(), (65536 if page == 1 else page) * int.from_bytes(header[28:32], "big"))

    def xRead(self, amount: int, offset: int) -> bytes:
        if offset + amount > super().xFileSize():
            raise apsw.IOError(f"nothing after byte {super().xFileSize()}")
        return super().xRead(amount, offset)


def _ros1(file: BinaryIO, note: Callable[[str], None]) -> Iterator[Salvaged]:
    file.seek(len(ROS1_MAGIC))
    topics: dict[int, tuple[str, str]] = {}
    while head := file.read(4):
        header = file.read(_size(head, file))
        data = file.read(size := _size(file.read(4), file))
        missing = len(data) < size
        fields = _ros1_header(header)
        if fields.get("op") == b"\x05":
            try:
                yield from _ros1_chunk(fields, data, topics, whole=not missing)
            except Exception as error:  # each compression has errors of its own
                note(f"a chunk of {len(data)} bytes before byte {file.tell()} cannot be read ({error})")
        elif not missing:
            yield from _ros1_content(fields, data, topics)
        if missing:
            raise Damage(f"it breaks off after byte {file.tell()}")


def _size(head: bytes, file: BinaryIO) -> int:
    size = int.from_bytes(head, "little")
    if len(head) < 4:
        raise Damage(f"it breaks off after byte {file.tell()}")
    if size > LARGEST_RECORD:
        raise Damage(f"there is no record at byte {file.tell()}")
    return size


def _ros1_header(data: bytes) -> dict[str, bytes]:
    fields, place = {}, 0
    while place + 4 <= len(data):
        end = place + 4 + int.from_bytes(data[place : place + 4], "little")
        name, _, value = data[place + 4 : end].partition(b"=")
        fields[name.decode(errors="replace")] = value
        place = end
    return fields


def _ros1_chunk(
    header: dict[str, bytes], data: bytes, topics: dict[int, tuple[str, str]], whole: bool
) -> Iterator[Salvaged]:
    data = _unpacked(data, header.get("compression", b"").decode(errors="replace"), whole)
    place = 0
    while place + 8 <= len(data):
        middle = place + 4 + int.from_bytes(data[place : place + 4], "little")
        end = middle + 4 + int.from_bytes(data[middle : middle + 4], "little")
        if end > len(data):
            return
        yield from _ros1_content(_ros1_header(data[place + 4 : middle]), data[middle + 4 : end], topics)
        place = end


def _ros1_content(header: dict[str, bytes], data: bytes, topics: dict[int, tuple[str, str]]) -> Iterator[Salvaged]:
    kind, connection = header.get("op"), int.from_bytes(header.get("conn", b""), "little")
    if kind == b"\x07":
        package, _, name = _ros1_header(data).get("type", b"").decode(errors="replace").rpartition("/")
        topics[connection] = header.get("topic", b"").decode(errors="replace"), f"{package}/msg/{name}"
    elif kind == b"\x02" and connection in topics:
        seconds, nanoseconds = struct.unpack("<II", header["time"])
        yield Salvaged(*topics[connection], seconds * 1_000_000_000 + nanoseconds, data)
