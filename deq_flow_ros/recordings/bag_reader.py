# SPDX-License-Identifier: Apache-2.0
"""Bags and their messages. Each data file is read for itself: what is damaged or missing costs only itself."""

from __future__ import annotations

import errno
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import yaml
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from deq_flow_ros.imaging import MediaError
from deq_flow_ros.recordings import containers, files, sqlite_bag
from deq_flow_ros.recordings.containers import Channel, Damage, zstd

log = logging.getLogger(__name__)

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class MessageError(MediaError):
    """A single message cannot be read. Other messages may be readable."""


@dataclass(frozen=True)
class Recorded:
    """A message of a bag, recorded at ``time_ns``."""

    channel: Channel
    time_ns: int
    _stored: bytes = field(repr=False)

    def raw(self) -> bytes:
        """The serialized message; fails as ``message`` does."""
        # A serialized message begins with its encoding, 0x00 0x00 or 0x00 0x01.
        if self._stored[:4] != ZSTD_MAGIC:
            return self._stored
        try:
            return zstd.decompress(self._stored)
        except zstd.ZstdError as error:
            raise self._unreadable(error) from error

    def message(self) -> Any:
        """The deserialized message, with its fields as attributes.

        :raises MessageError: if it cannot be decoded.
        """
        raw, msgtype, types = self.raw(), self.channel.msgtype, _types(self.channel.ros1)
        decode = types.deserialize_ros1 if self.channel.ros1 else types.deserialize_cdr
        try:
            return _from_protobuf(raw) if msgtype == PROTOBUF else decode(raw, msgtype)
        except Exception as error:  # of damaged bytes, the code that rosbags generates makes any
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> MessageError:
        what = f"the message ({self.channel.msgtype}) on {self.channel.topic} that was recorded at {self.time_ns} ns"
        return MessageError(f"{what} cannot be decoded: {type(error).__name__}: {error}")


_DEFINITIONS = {
    "ffmpeg_image_transport_msgs/msg/FFMPEGPacket": "std_msgs/Header header\nint32 width\nint32 height\n"
    "string encoding\nuint64 pts\nuint8 flags\nbool is_bigendian\nuint8[] data\n",
    "foxglove_msgs/msg/CompressedVideo": "builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\n"
    "string format\n",
}
PROTOBUF = "foxglove.CompressedVideo in protobuf"
VIDEO = (*_DEFINITIONS, PROTOBUF)
"""Every type of message that holds video."""


@cache
def _types(ros1: bool) -> Typestore:
    """Those of rosbags, and those of video, which it lacks."""
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_JAZZY)
    for name, definition in _DEFINITIONS.items():
        store.register(get_types_from_msg(definition, name))
    return store


def _from_protobuf(raw: bytes) -> Any:
    """``foxglove.CompressedVideo``, with fields as in the message of ROS."""
    fields = dict(_fields(raw))
    time = dict(_fields(fields.get(1, b"")))
    stamp = SimpleNamespace(sec=int(time.get(1, 0)), nanosec=int(time.get(2, 0)))
    frame_id, format = (fields.get(number, b"").decode() for number in (2, 4))
    return SimpleNamespace(timestamp=stamp, frame_id=frame_id, data=fields.get(3, b""), format=format)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a message: https://protobuf.dev/programming-guides/encoding.

    Four fields do not make protobuf worth a dependency, whose versions other packages pin as well.
    """
    place = 0
    while place < len(raw):
        tag, place = _varint(raw, place)
        if tag & 7 == 0:
            value, place = _varint(raw, place)
            yield tag >> 3, value
            continue
        size, place = _varint(raw, place) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], place)
        if place + size > len(raw):
            raise ValueError("it ends early")
        yield tag >> 3, raw[place : place + size]
        place += size


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while raw[place] > 127:
        value |= (raw[place] & 127) << shift
        place, shift = place + 1, shift + 7
    return value | raw[place] << shift, place + 1


class Bag:
    """A rosbag2 (directory, .mcap or .db3), or a ROS 1 .bag, for reading.

    It may be split, compressed by zstd (whole files or single messages), and without a useful ``metadata.yaml``. One
    file at a time is open, and unpacked if it is compressed.

    :ivar topics: how many messages can be read, by topic and by type. Nearly every topic has a single type.
    :ivar problems: what is missing or cannot be read, a sentence each; grows while messages are read.
    :raises MediaError: where there is nothing that can be read, or an unknown compression.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self._counts = {file: self._count(file) for file in self._find_files()}
        self.topics: dict[str, Counter[str]] = {}
        for counts in self._counts.values():
            for channel, count in counts.items():
                self.topics.setdefault(channel.topic, Counter())[channel.msgtype] += count
        if not self.topics and self.problems:
            raise MediaError(f"the bag {path} cannot be read: {'; '.join(self.problems)}")

    def messages(self, *topics: str) -> Iterator[Recorded]:
        """Those of the given topics, or of all, file by file in the order of recording."""
        for file, counts in self._counts.items():
            missing = Counter({channel: n for channel, n in counts.items() if not topics or channel.topic in topics})
            for recorded in self._read(file, topics):
                missing[recorded.channel] -= 1
                yield recorded
            if (lost := (+missing).total()) and not any(text.startswith(f"{file} ") for text in self.problems):
                self.note(f"{file} is damaged: it lacks {lost} messages that its index counts")

    def of_type(self, topic: str, msgtype: str) -> Iterator[Recorded]:
        """The messages of a topic that are of this type."""
        return (recorded for recorded in self.messages(topic) if recorded.channel.msgtype == msgtype)

    def note(self, problem: str) -> None:
        """Add to ``problems`` what is not among them yet."""
        if problem not in self.problems:
            self.problems.append(problem)

    def _find_files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        visible = files.visible_files(self.path)
        present = {child.name: child for child in visible if child.name.endswith(files.DATA_SUFFIXES)}
        listed = self._listed()
        if listed is None:
            stems = sorted({files.stem_of_part(name) for name in present})
            if len(stems) > 1:
                several = f"several recordings ({', '.join(stems[:4])}) and no metadata.yaml that joins them"
                hint = "give one of its files, or evaluate all of them with --bags"
                raise MediaError(f"the folder {self.path} holds {several}; {hint}")
            if gaps := files.missing_parts(present, self.path.resolve().name):
                self.note(f"the parts {', '.join(gaps)} of {self.path} are missing, as the numbers of the others say")
            return files.natural_order(present.values())
        found = [self.path / name for name in listed if (self.path / name).is_file()]
        for file in (self.path / name for name in listed):
            if file not in found:
                self.note(f"the file {file}, which metadata.yaml names, is missing")
        if other := sorted(set(present) - set(listed)):
            self.note(f"left out {', '.join(other)}: metadata.yaml of {self.path} does not name it")
        one = len(set(map(files.stem_of_part, listed))) == 1
        return files.natural_order(found) if one else found  # some tools list part 10 before part 2

    def _listed(self) -> list[str] | None:
        """The data files that metadata.yaml names; None where it is missing or says nothing of use."""
        path = self.path / files.METADATA
        if not path.exists():
            return None
        try:
            information = yaml.safe_load(path.read_text(encoding="utf-8"))["rosbag2_bagfile_information"]
            paths = information["relative_file_paths"]
            listed = [PurePath(str(name)).name for name in ([paths] if isinstance(paths, str) else paths)]
            compression = str(information.get("compression_format") or "")
        except (KeyError, TypeError, AttributeError):
            what = "it has no list rosbag2_bagfile_information: relative_file_paths"
            log.warning("%s cannot be used: %s; reading the data files beside it", path, what)
            return None
        except (OSError, ValueError, yaml.YAMLError) as error:
            what = " ".join(str(error).split())
            log.warning("%s cannot be used: %.200s; reading the data files beside it", path, what)
            return None
        if compression not in ("", "zstd"):
            raise MediaError(f"the bag {self.path} is compressed by {compression!r}; expected zstd or none")
        return listed or None

    def _count(self, file: Path) -> Counter[Channel]:
        """By the index of the file; without one, or with a damaged one, by what can be read."""
        counts = None
        with _unzipped(file, self.note) as plain:
            try:
                counts = (sqlite_bag if sqlite_bag.is_sqlite(plain) else containers).count_messages(plain)
            except Damage:
                log.info("counting the messages of %s, whose index cannot be used", file)
        return Counter(recorded.channel for recorded in self._read(file, ())) if counts is None else counts

    def _read(self, file: Path, topics: Collection[str]) -> Iterator[Recorded]:
        def note(what: object) -> None:
            self.note(f"{file} is damaged: {what}")

        with _unzipped(file, self.note) as plain:
            sqlite = sqlite_bag.is_sqlite(plain)
            if plain != file and not plain.stat().st_size:
                return  # nothing could be unpacked, which is noted
            try:
                found = sqlite_bag.messages(plain, topics) if sqlite else containers.messages(plain, note)
                for channel, time_ns, stored in found:
                    if not topics or channel.topic in topics:
                        yield Recorded(channel, time_ns, stored)
            except Damage as damage:
                note(damage)


@contextmanager
def _unzipped(file: Path, note: Callable[[str], None]) -> Iterator[Path]:
    """The file itself; of one that is compressed as a whole, its content in a temporary file, as far as it comes out.

    :param note: hears what cannot be unpacked.
    """
    if file.suffix != ".zstd" or not files.begins(file, ZSTD_MAGIC):
        yield file
        return
    with TemporaryDirectory(prefix="bag_") as folder:
        plain = Path(folder) / file.stem
        try:
            with file.open("rb") as packed, zstd.open(packed, "rb") as content, plain.open("wb") as written:
                shutil.copyfileobj(content, written, 1 << 20)
        except (zstd.ZstdError, EOFError) as error:
            note(f"{file} is damaged: it cannot be unpacked to its end ({error})")
        except OSError as error:
            hint = "; set TMPDIR to a folder with more room" if error.errno == errno.ENOSPC else ""
            raise MediaError(f"cannot unpack {file} into {folder}: {error}{hint}") from error
        yield plain


def read_messages(path: str | Path, *topics: str) -> Iterator[tuple[str, int, Any]]:
    """Yield (topic, time of recording in ns, message) of the given topics, or of all, in the order of recording.

    :raises MediaError: if the bag cannot be read completely.
    """
    bag = Bag(Path(path))
    for recorded in () if bag.problems else bag.messages(*topics):
        yield recorded.channel.topic, recorded.time_ns, recorded.message()
    if bag.problems:
        raise MediaError(f"the bag {bag.path} cannot be read: {'; '.join(bag.problems)}")
