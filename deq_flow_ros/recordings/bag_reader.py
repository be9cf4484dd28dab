# SPDX-License-Identifier: Apache-2.0
"""Bags as their data files, each read for itself: what is damaged or missing costs only itself, and is named."""

from __future__ import annotations

import errno
import itertools
import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

from deq_flow_ros.imaging.frame import MediaError
from deq_flow_ros.recordings.salvage import ROS1_MAGIC, salvage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

log = logging.getLogger(__name__)

DATA_SUFFIXES = (".mcap", ".db3", ".mcap.zstd", ".db3.zstd")
"""Data files of a rosbag2."""
BAG_SUFFIXES = (*DATA_SUFFIXES, ".bag", ".bag.active")
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class MessageError(MediaError):
    """One message cannot be read; those beside it may."""


@dataclass(frozen=True)
class Recorded:
    """A message of a bag, recorded at `time_ns`."""

    topic: str
    msgtype: str
    time_ns: int
    _stored: bytes = field(repr=False)
    _decode: Callable[[bytes, str], Any] = field(repr=False)

    def raw(self) -> bytes:
        """As it was serialized. Raises `MessageError` where it was compressed and cannot be unpacked."""
        # A serialized message begins with how it is encoded, 0x00 0x00 or 0x00 0x01.
        if self._stored[:4] != ZSTD_MAGIC:
            return self._stored
        try:
            return zstd.decompress(self._stored)
        except zstd.ZstdError as error:
            raise self._unreadable(error) from error

    def message(self) -> Any:
        """Its fields by name. Raises `MessageError` where it cannot be decoded."""
        raw = self.raw()
        try:
            return self._decode(raw, self.msgtype)
        except Exception as error:
            # Damaged bytes raise whatever the code that rosbags generates stumbles over.
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> MessageError:
        what = f"the message ({self.msgtype}) on {self.topic} that was recorded at {self.time_ns} ns"
        return MessageError(f"{what} cannot be decoded: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class Topic:
    """A topic of a bag; `count` messages as far as they can be read."""

    msgtype: str
    count: int


class Bag:
    """A rosbag2 (directory, .mcap or .db3), or a ROS 1 .bag, for reading.

    Split and zstd-compressed recordings (whole files or single messages) are read like any other; so are those without
    `metadata.yaml`, or with a useless one. One file at a time is open, and unpacked if it is compressed.

    :raises MediaError: where there is nothing that can be read, or an unknown compression.

    :ivar topics: by name.
    :ivar problems: what is missing or cannot be read, a sentence each; grows while messages are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self._files = self._find_files()
        self._damaged: set[Path] = set()
        self.topics: dict[str, Topic] = {}
        counts: Counter[str] = Counter()
        types: dict[str, str] = {}
        for file in self._files:
            for topic, msgtype, count in self._list(file):
                types.setdefault(topic, msgtype)
                counts[topic] += count
        self.topics = {topic: Topic(msgtype, counts[topic]) for topic, msgtype in types.items()}
        if not self.topics and self.problems:
            raise MediaError(f"the bag {path} cannot be read: {'; '.join(self.problems)}")

    def messages(self, *topics: str) -> Iterator[Recorded]:
        """Those of the given topics, or of all, file by file in the order of recording."""
        for file in self._files:
            done: Counter[str] = Counter()
            if file not in self._damaged:
                try:
                    for recorded in self._intact(file, topics):
                        done[recorded.topic] += 1
                        yield recorded
                    continue
                except _Unreadable as error:
                    log.warning("%s is damaged: %s", file, error)
                    self._damaged.add(file)
            # Again from the front, past what there was already.
            seen: Counter[str] = Counter()
            for recorded in self._salvaged(file, topics):
                seen[recorded.topic] += 1
                if seen[recorded.topic] > done[recorded.topic]:
                    yield recorded

    def first(self, topic: str) -> Recorded | None:
        """The first message of a topic that can be read."""
        return next(self.messages(topic), None)

    def _find_files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        present = {child.name: child for child in self.path.iterdir() if child.name.endswith(DATA_SUFFIXES)}
        listed = self._listed()
        if listed is None:
            stems = {stem_of_part(name) for name in present}
            if len(stems) > 1:
                raise MediaError(
                    f"the folder {self.path} holds several recordings ({', '.join(sorted(stems)[:4])}), and no "
                    "metadata.yaml that makes them one; name one of its files, or evaluate all of them with --bags"
                )
            return natural_order(present.values())
        missing = [name for name in listed if name not in present]
        self.problems += [f"the file {self.path / name}, which metadata.yaml names, is missing" for name in missing]
        if other := sorted(set(present) - set(listed)):
            log.warning("left out %s: metadata.yaml of %s does not name it", ", ".join(other), self.path)
        return [present[name] for name in listed if name in present]

    def _listed(self) -> list[str] | None:
        """The data files that metadata.yaml names; None where it is missing or says nothing of use."""
        path = self.path / "metadata.yaml"
        if not path.exists():
            return None
        try:
            information = yaml.safe_load(path.read_text(encoding="utf-8"))["rosbag2_bagfile_information"]
            listed = [PurePath(str(name)).name for name in information["relative_file_paths"]]
            compression = str(information.get("compression_format") or "")
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s says nothing of use (%r); reading the data files beside it", path, error)
            return None
        if compression not in ("", "zstd"):
            raise MediaError(f"the bag {self.path} is compressed by {compression!r}; expected zstd or none")
        return listed or None

    def _list(self, file: Path) -> Iterator[tuple[str, str, int]]:
        """(topic, type, number of messages) of a file."""
        try:
            with _opened(file) as reader:
                yield from [(item.topic, item.msgtype, item.msgcount) for item in reader.connections]
                return
        except _Unreadable as error:
            log.warning("%s is damaged: %s", file, error)
            self._damaged.add(file)
        counts = Counter((recorded.topic, recorded.msgtype) for recorded in self._salvaged(file, ()))
        yield from ((topic, msgtype, count) for (topic, msgtype), count in counts.items())

    def _intact(self, file: Path, topics: Collection[str]) -> Iterator[Recorded]:
        with _opened(file) as reader:
            connections = [item for item in reader.connections if not topics or item.topic in topics]
            if not connections:
                return
            # Not `reader.deserialize`: the reader forgets its types when it is closed.
            types = reader.typestore
            decode = types.deserialize_cdr if reader.is2 else types.deserialize_ros1
            for connection, time_ns, raw in reader.messages(connections):
                yield Recorded(connection.topic, connection.msgtype, time_ns, raw, decode)

    def _salvaged(self, file: Path, topics: Collection[str]) -> Iterator[Recorded]:
        with _unzipped(file) as plain:
            types = _types(_is_ros1(plain))
            decode = types.deserialize_ros1 if _is_ros1(plain) else types.deserialize_cdr
            for topic, msgtype, time_ns, raw in salvage(plain, lambda what: self.note(f"{file} is damaged: {what}")):
                if not topics or topic in topics:
                    yield Recorded(topic, msgtype, time_ns, raw, decode)

    def note(self, problem: str) -> None:
        """Add to `problems` what is not among them yet."""
        if problem not in self.problems:
            self.problems.append(problem)


class _Unreadable(Exception):
    """A file cannot be read, or not further."""


@contextmanager
def _opened(file: Path) -> Iterator[AnyReader]:
    try:
        with _unzipped(file) as plain, AnyReader([plain], default_typestore=_types(False)) as reader:
            yield reader
    except (MediaError, GeneratorExit):
        raise
    except Exception as error:
        # rosbags lets sqlite, struct, zstd and yaml errors through: whatever it is, the file cannot be read.
        raise _Unreadable(f"{type(error).__name__}: {error}") from error


@contextmanager
def _unzipped(file: Path) -> Iterator[Path]:
    """The file itself; or, of one that is compressed as a whole, its content in a temporary file."""
    if file.suffix != ".zstd":
        yield file
        return
    with TemporaryDirectory(prefix="bag_") as folder:
        plain = Path(folder) / file.stem
        try:
            with file.open("rb") as packed, zstd.open(packed, "rb") as content, plain.open("wb") as written:
                shutil.copyfileobj(content, written, 1 << 20)
        except (zstd.ZstdError, EOFError) as error:
            # What came out until then may still be read from the front.
            log.warning("%s cannot be unpacked to its end: %s", file, error)
        except OSError as error:
            hint = "; set TMPDIR to a folder with more room" if error.errno == errno.ENOSPC else ""
            raise MediaError(f"cannot unpack {file} into {folder}: {error}{hint}") from error
        yield plain


def _is_ros1(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(ROS1_MAGIC)) == ROS1_MAGIC


@cache
def _types(ros1: bool) -> Typestore:
    return get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_JAZZY)


def stem_of_part(name: str) -> str:
    """What the names of a split recording's files have in common: "drive" of "drive_3.mcap"."""
    return re.sub(r"_\d+$", "", name.partition(".")[0])


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sorted by name, numbers by their value: 2 before 10."""
    return sorted(
        paths, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
    )


def first_times(bag: Bag, topic: str, count: int) -> list[int]:
    """Times of recording in ns of the first messages of a topic."""
    return [recorded.time_ns for recorded in itertools.islice(bag.messages(topic), count)]
