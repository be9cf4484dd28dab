# SPDX-License-Identifier: Apache-2.0
"""Bags as their data files, each read for itself: what is damaged or missing costs only itself, and is named."""

from __future__ import annotations

import errno
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from rosbags.interfaces import Connection
from rosbags.rosbag1 import Reader as Reader1
from rosbags.rosbag2 import Reader as Reader2

from deq_flow_ros.imaging import MediaError
from deq_flow_ros.recordings import sqlite_bag
from deq_flow_ros.recordings.files import (
    DATA_SUFFIXES,
    ROS1_MAGIC,
    begins,
    missing_parts,
    natural_order,
    stem_of_part,
    visible_files,
)
from deq_flow_ros.recordings.messages import ZSTD_MAGIC, Channel, Damage, Recorded
from deq_flow_ros.recordings.scan import scan

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

log = logging.getLogger(__name__)


class Bag:
    """A rosbag2 (directory, .mcap or .db3), or a ROS 1 .bag, for reading.

    Split and zstd-compressed recordings (whole files or single messages) are read like any other; so are those without
    ``metadata.yaml``, or with a useless one. One file at a time is open, and unpacked if it is compressed.

    :ivar topics: how many messages can be read, by topic and by type. Nearly every topic has a single type.
    :ivar problems: what is missing or cannot be read, a sentence each; grows while messages are read.
    :raises MediaError: where there is nothing that can be read, or an unknown compression.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self._files = self._find_files()
        self._unindexed: set[Path] = set()
        self._announced: dict[Path, Counter[str]] = {}  # messages by topic, as the index of a file has them
        self.topics: dict[str, Counter[str]] = {}
        for file in self._files:
            for channel, count in self._list(file).items():
                self.topics.setdefault(channel.topic, Counter())[channel.msgtype] += count
        if not self.topics and self.problems:
            raise MediaError(f"the bag {path} cannot be read: {'; '.join(self.problems)}")

    def messages(self, *topics: str) -> Iterator[Recorded]:
        """Those of the given topics, or of all, file by file in the order of recording."""
        for file in self._files:
            done: Counter[tuple[str, int]] = Counter()
            if file not in self._unindexed:
                try:
                    for recorded in self._indexed(file, topics):
                        done[recorded.topic, recorded.time_ns] += 1
                        yield recorded
                    continue
                except _Unreadable as error:
                    self._give_up_index(file, error)
            # Again from the front; what there was already is left out.
            missing = self._announced.get(file, Counter()).copy()
            for recorded in self._scanned(file, topics):
                missing[recorded.topic] -= 1
                if done[recorded.topic, recorded.time_ns]:
                    done[recorded.topic, recorded.time_ns] -= 1
                else:
                    yield recorded
            lost = sum(max(0, count) for topic, count in missing.items() if not topics or topic in topics)
            if lost and not any(problem.startswith(f"{file} ") for problem in self.problems):
                self.note(f"{file} is damaged: it lacks {lost} messages that its index counts")

    def of_type(self, topic: str, msgtype: str) -> Iterator[Recorded]:
        """The messages of a topic that are of this type."""
        return (recorded for recorded in self.messages(topic) if recorded.msgtype == msgtype)

    def _find_files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        present = {child.name: child for child in visible_files(self.path) if child.name.endswith(DATA_SUFFIXES)}
        listed = self._listed()
        if listed is None:
            stems = {stem_of_part(name) for name in present}
            if len(stems) > 1:
                raise MediaError(
                    f"the folder {self.path} holds several recordings ({', '.join(sorted(stems)[:4])}) and no "
                    "metadata.yaml that joins them; give one of its files, or evaluate all of them with --bags"
                )
            if gaps := missing_parts(present, self.path.resolve().name):
                self.note(f"the parts {', '.join(gaps)} of {self.path} are missing, as the numbers of the others say")
            return natural_order(present.values())
        missing = [name for name in listed if name not in present]
        self.problems += [f"the file {self.path / name}, which metadata.yaml names, is missing" for name in missing]
        if other := sorted(set(present) - set(listed)):
            what = f"left out {', '.join(other)}: metadata.yaml of {self.path} does not name it"
            alike = {stem_of_part(name) for name in listed} & {stem_of_part(name) for name in other}
            self.note(what) if alike else log.warning(what)
        found = [present[name] for name in listed if name in present]
        # Some tools list part 10 before part 2.
        return natural_order(found) if len({stem_of_part(name) for name in listed}) == 1 else found

    def _listed(self) -> list[str] | None:
        """The data files that metadata.yaml names; None where it is missing or says nothing of use."""
        path = self.path / "metadata.yaml"
        if not path.exists():
            return None
        try:
            information = yaml.safe_load(path.read_text(encoding="utf-8"))["rosbag2_bagfile_information"]
            paths = information["relative_file_paths"]
            listed = [PurePath(str(name)).name for name in ([paths] if isinstance(paths, str) else paths)]
            compression = str(information.get("compression_format") or "")
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be used (%.100r); reading the data files beside it", path, error)
            return None
        if compression not in ("", "zstd"):
            raise MediaError(f"the bag {self.path} is compressed by {compression!r}; expected zstd or none")
        return listed or None

    def _list(self, file: Path) -> dict[Channel, int]:
        """Number of messages of a file by where they come from."""
        try:
            with _unzipped(file) as plain:
                if sqlite_bag.is_sqlite(plain):
                    self._unindexed.add(file)
                    return sqlite_bag.count_messages(plain)
            with _opened(file) as reader:
                counts = _counts(reader)
            for channel, count in counts.items():
                self._announced.setdefault(file, Counter())[channel.topic] += count
            return counts
        except (_Unreadable, Damage) as error:
            self._give_up_index(file, error)
        return Counter(recorded.channel for recorded in self._scanned(file, ()))

    def _give_up_index(self, file: Path, why: Exception) -> None:
        log.info("reading %s from the front, without its index: %s", file, why)
        self._unindexed.add(file)

    def _indexed(self, file: Path, topics: Collection[str]) -> Iterator[Recorded]:
        with _opened(file) as reader:
            connections = [item for item in reader.connections if not topics or item.topic in topics]
            missing = sum(n for channel, n in _counts(reader).items() if not topics or channel.topic in topics)
            for connection, time_ns, raw in reader.messages(connections) if connections else ():
                missing -= 1
                yield Recorded(_channel(reader, connection), time_ns, raw)
            if missing > 0:
                raise _Unreadable(f"{missing} messages cannot be found through its index")

    def _scanned(self, file: Path, topics: Collection[str]) -> Iterator[Recorded]:
        with _unzipped(file, self.note) as plain:
            if plain == file or plain.stat().st_size:
                yield from scan(plain, lambda what: self.note(f"{file} is damaged: {what}"), topics)

    def note(self, problem: str) -> None:
        """Add to ``problems`` what is not among them yet."""
        if problem not in self.problems:
            self.problems.append(problem)


class _Unreadable(Exception):
    """A file cannot be read, or not further."""


@contextmanager
def _opened(file: Path) -> Iterator[Reader1 | Reader2]:
    try:
        with _unzipped(file) as plain, (Reader1 if begins(plain, ROS1_MAGIC) else Reader2)(plain) as reader:
            yield reader
    except (MediaError, GeneratorExit, _Unreadable):
        raise
    except Exception as error:
        # rosbags lets struct, zstd and yaml errors through: whatever it is, the file cannot be read.
        raise _Unreadable(f"{type(error).__name__}: {error}") from error


def _counts(reader: Reader1 | Reader2) -> dict[Channel, int]:
    counts: Counter[Channel] = Counter()
    for connection in reader.connections:
        count = connection.msgcount
        if isinstance(reader, Reader1):  # which tells what the index leads to, and may be less than what it counts
            count = max(count, sum(chunk.connection_counts.get(connection.id, 0) for chunk in reader.chunk_infos))
        counts[_channel(reader, connection)] += count
    return counts


def _channel(reader: Reader1 | Reader2, connection: Connection) -> Channel:
    return Channel(connection.topic, connection.msgtype, isinstance(reader, Reader1))


@contextmanager
def _unzipped(file: Path, note: Callable[[str], None] = log.warning) -> Iterator[Path]:
    """The file itself; or, of one that is compressed as a whole, its content in a temporary file.

    :param note: hears what cannot be unpacked.
    """
    if file.suffix != ".zstd" or not begins(file, ZSTD_MAGIC):
        yield file
        return
    with TemporaryDirectory(prefix="bag_") as folder:
        plain = Path(folder) / file.stem
        try:
            with file.open("rb") as packed, zstd.open(packed, "rb") as content, plain.open("wb") as written:
                shutil.copyfileobj(content, written, 1 << 20)
        except (zstd.ZstdError, EOFError) as error:
            # What came out until then may still be read from the front.
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
        yield recorded.topic, recorded.time_ns, recorded.message()
    if bag.problems:
        raise MediaError(f"the bag {bag.path} cannot be read: {'; '.join(bag.problems)}")


def read_image(message: Any) -> np.ndarray:
    """The array of an image message: 32FC1 (H, W) float32, 32FC2 (H, W, 2) float32 or rgb8 (H, W, 3) uint8.

    :raises MediaError: for other encodings, or if the message holds too few bytes.
    """
    layouts = {"32FC1": (np.float32, 1), "32FC2": (np.float32, 2), "rgb8": (np.uint8, 3)}
    if message.encoding not in layouts:
        raise MediaError(f"expected an image of encoding {sorted(layouts)}, got {message.encoding!r}")
    kind, channels = layouts[message.encoding]
    dtype = np.dtype(kind).newbyteorder(">" if message.is_bigendian else "<")
    row = message.width * channels * dtype.itemsize
    if message.step < row or message.data.size < message.step * message.height:
        got = f"step {message.step} and {message.data.size} bytes"
        raise MediaError(f"expected {message.height} rows of at least {row} bytes, got {got}")
    data = np.asarray(message.data).view(np.uint8)[: message.step * message.height]
    rows = np.ascontiguousarray(data.reshape(message.height, message.step)[:, :row])
    image = rows.view(dtype).reshape(message.height, message.width, channels)
    return image[:, :, 0] if channels == 1 else image
