# SPDX-License-Identifier: Apache-2.0
"""Bag files read from the front, record by record, without their index.

So are unfinished and damaged files, which rosbags refuses as a whole, and MCAP files with more in them than ROS 2
messages. Formats: https://mcap.dev/spec and https://wiki.ros.org/Bags/Format/2.0.
"""

from __future__ import annotations

import bz2
import contextlib
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import lz4.frame

from deq_flow_ros.recordings import sqlite_bag
from deq_flow_ros.recordings.files import MCAP_MAGIC, ROS1_MAGIC
from deq_flow_ros.recordings.messages import Channel, Damage, Recorded, ros_type

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LARGEST_RECORD = 1 << 30
"""A record that claims more bytes is damaged."""
Note = Callable[[str], None]


def scan(path: Path, note: Note, topics: Collection[str] = ()) -> Iterator[Recorded]:
    """The messages of a bag file in the order in which they lie there, up to where it breaks off.

    :param note: hears what cannot be read, a phrase each: "it breaks off after byte 1200000".
    :param topics: those of which messages are wanted; empty: all.
    """
    try:
        for found in _messages(path, note, topics):
            if not topics or found.channel.topic in topics:
                yield found
    except Damage as damage:
        note(str(damage))


def _messages(path: Path, note: Note, topics: Collection[str]) -> Iterator[Recorded]:
    if sqlite_bag.is_sqlite(path):
        yield from sqlite_bag.messages(path, topics)
        return
    with path.open("rb") as file:
        magic = file.read(len(ROS1_MAGIC))
        if magic.startswith(MCAP_MAGIC):
            yield from _mcap(file, note)
        elif magic == ROS1_MAGIC:
            yield from _ros1(file, note)
        else:
            raise Damage(
                "it is not a bag (MCAP, SQLite or ROS 1), or its beginning is lost" if magic else "it is empty"
            )


def _mcap(file: BinaryIO, note: Note) -> Iterator[Recorded]:
    schemas: dict[int, tuple[str, str]] = {}
    channels: dict[int, Channel] = {}
    _mcap_summary(file, schemas, channels)
    for kind, body, whole in _mcap_records(file):
        if kind == 0x0F:  # the end of the data; what follows is its index
            return
        chunk = kind == 0x06
        try:
            records = _mcap_records(BytesIO(_mcap_chunk(body, whole))) if chunk else [(kind, body, whole)]
            for inner, content, complete in records:
                if complete and (found := _mcap_content(inner, content, schemas, channels)) is not None:
                    yield found
                elif not complete and whole:
                    raise Damage("it holds a record that is longer than itself")
        except Exception as error:  # each compression has errors of its own
            note(_lost("chunk" if chunk else "record", body, file, error))
    raise Damage(f"it breaks off after byte {file.tell()}")


def _mcap_summary(file: BinaryIO, schemas: dict[int, tuple[str, str]], channels: dict[int, Channel]) -> None:
    """Read the channels at the end of a file that was closed: those at its beginning may be damaged."""
    size = file.seek(0, SEEK_END)
    with contextlib.suppress(Exception):
        file.seek(size - 37)  # the last record and the magic bytes
        kind, body, _ = next(_mcap_records(file))
        file.seek(struct.unpack_from("<Q", body)[0] or size)
        for kind, body, whole in _mcap_records(file):
            if whole and kind in (0x03, 0x04):
                _mcap_content(kind, body, schemas, channels)
    file.seek(len(MCAP_MAGIC))


def _mcap_records(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Kind and content of every record, and whether the content is all there."""
    while len(head := file.read(9)) == 9:
        if not head[0]:
            raise Damage(f"there is no record at byte {file.tell() - 9}")
        body = file.read(size := _size(head[1:], file))
        yield head[0], body, len(body) == size


def _mcap_chunk(body: bytes, whole: bool) -> bytes:
    checksum = int.from_bytes(body[24:28], "little")
    compression, place = _text(body, 28)
    data = _unpacked(body[place + 8 :], compression, whole)
    if whole and checksum and crc32(data) != checksum:
        raise Damage("its checksum is wrong")
    return data


def _mcap_content(
    kind: int, body: bytes, schemas: dict[int, tuple[str, str]], channels: dict[int, Channel]
) -> Recorded | None:
    if kind == 0x03:
        name, place = _text(body, 2)
        schemas[int.from_bytes(body[:2], "little")] = name, _text(body, place)[0]
    elif kind == 0x04:
        number, schema = struct.unpack_from("<HH", body)
        topic, place = _text(body, 4)
        name, language = schemas.get(schema, ("", ""))
        form = _text(body, place)[0]
        if form in ("cdr", "ros1") and name:
            channels[number] = Channel(topic, ros_type(name), form == "ros1")
        else:
            channels[number] = Channel(topic, f"{name or 'data'} in {language or form or 'an unknown form'}")
    elif kind == 0x05:
        number, _, time_ns, _ = struct.unpack_from("<HIQQ", body)
        if number not in channels:
            raise Damage("nothing says to which topic it belongs")
        return Recorded(channels[number], time_ns, body[22:])
    elif 0x10 <= kind < 0x80:  # from there on, everybody may have own ones
        raise Damage(f"it is of an unknown kind, {kind:#x}")
    return None


def _ros1(file: BinaryIO, note: Note) -> Iterator[Recorded]:
    channels: dict[int, Channel] = {}
    for header, data, whole in _ros1_records(file):
        fields = _ros1_fields(header)
        chunk = fields.get("op") == b"\x05"
        try:
            compression = fields.get("compression", b"").decode(errors="replace")
            records = _ros1_records(BytesIO(_unpacked(data, compression, whole))) if chunk else [(header, data, whole)]
            for inner, content, complete in records:
                if complete and (found := _ros1_content(_ros1_fields(inner), content, channels)) is not None:
                    yield found
                elif not complete and whole:
                    raise Damage("it holds a record that is longer than itself")
        except Exception as error:  # each compression has errors of its own
            note(_lost("chunk" if chunk else "record", data, file, error))
        if not whole:
            raise Damage(f"it breaks off after byte {file.tell()}")


def _ros1_records(file: BinaryIO) -> Iterator[tuple[bytes, bytes, bool]]:
    """Header and content of every record, and whether both are all there."""
    while head := file.read(4):
        if not any(head):
            raise Damage(f"there is no record at byte {file.tell() - len(head)}")
        header = data = b""
        whole = len(head) == 4 and len(header := file.read(_size(head, file))) == int.from_bytes(head, "little")
        if whole and (whole := len(head := file.read(4)) == 4):
            whole = len(data := file.read(_size(head, file))) == int.from_bytes(head, "little")
        yield header, data, whole


def _ros1_fields(data: bytes) -> dict[str, bytes]:
    fields, place = {}, 0
    while place + 4 <= len(data):
        end = place + 4 + int.from_bytes(data[place : place + 4], "little")
        name, _, value = data[place + 4 : end].partition(b"=")
        fields[name.decode(errors="replace")] = value
        place = end
    return fields


def _ros1_content(fields: dict[str, bytes], data: bytes, channels: dict[int, Channel]) -> Recorded | None:
    kind, number = fields.get("op"), int.from_bytes(fields.get("conn", b""), "little")
    if kind == b"\x07":
        name = _ros1_fields(data).get("type", b"").decode(errors="replace")
        channels[number] = Channel(fields.get("topic", b"").decode(errors="replace"), ros_type(name), ros1=True)
    elif kind == b"\x02":
        if number not in channels:
            raise Damage("nothing says to which topic it belongs")
        seconds, nanoseconds = struct.unpack("<II", fields["time"])
        return Recorded(channels[number], seconds * 1_000_000_000 + nanoseconds, data)
    elif kind not in (b"\x03", b"\x04", b"\x06"):
        raise Damage(f"it is of an unknown kind, {kind!r}")
    return None


def _lost(what: str, body: bytes, file: BinaryIO, error: Exception) -> str:
    why = f"{type(error).__name__}: {error}" if isinstance(error, (struct.error, KeyError)) else str(error)
    return f"a {what} of {len(body)} bytes before byte {file.tell()} cannot be read ({why})"


def _size(head: bytes, file: BinaryIO) -> int:
    """The size that a record begins with, just read."""
    if (size := int.from_bytes(head, "little")) > LARGEST_RECORD:
        raise Damage(f"there is no record at byte {file.tell() - len(head)}")
    return size


def _unpacked(data: bytes, compression: str, whole: bool) -> bytes:
    """What a chunk holds; of one that is not all there, as much as comes out."""
    if compression in ("", "none"):
        return data
    unpackers = {"zstd": zstd.ZstdDecompressor, "lz4": lz4.frame.LZ4FrameDecompressor, "bz2": bz2.BZ2Decompressor}
    if compression not in unpackers:
        raise Damage(f"its compression is {compression!r}, expected {', '.join(unpackers)} or none")
    unpacker = unpackers[compression]()
    content = unpacker.decompress(data, LARGEST_RECORD)
    if whole and not unpacker.eof:
        raise Damage("it ends early")
    return content


def _text(body: bytes, place: int) -> tuple[str, int]:
    """A string with its length before it, and where it ends."""
    end = place + 4 + int.from_bytes(body[place : place + 4], "little")
    return body[place + 4 : end].decode(errors="replace"), end
