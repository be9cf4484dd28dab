# SPDX-License-Identifier: Apache-2.0
"""SQLite files of rosbag2, with their write-ahead log, and as far as they are there. Nothing is written beside them.

rosbags leaves out the log, where a killed recorder has its last messages, and reads no file that is cut short.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import apsw

from deq_flow_ros.recordings.containers import Channel, Damage, Stored
from deq_flow_ros.recordings.files import SQLITE_MAGIC, begins

LOG = "-wal"
"""What SQLite appends to the name of a file for that of its write-ahead log."""


def is_sqlite(path: Path) -> bool:
    """Whether a file is an SQLite database; one whose content is in its write-ahead log alone is empty."""
    return begins(path, SQLITE_MAGIC) or (not path.stat().st_size and _has_log(path))


def _has_log(path: Path) -> bool:
    log = Path(f"{path}{LOG}")
    return log.is_file() and log.stat().st_size > 0


def count_messages(path: Path) -> Counter[Channel]:
    """Number of messages, without reading them.

    :raises Damage: where the file cannot be read to its end.
    """
    with _opened(path) as (database, channels):
        counts = dict(database.execute("SELECT topic_id, count(*) FROM messages NOT INDEXED GROUP BY topic_id"))
        database.execute("SELECT data FROM messages NOT INDEXED ORDER BY rowid DESC LIMIT 1").fetchall()
    return Counter({channel: counts.get(key, 0) for key, channel in channels.items()})


def messages(path: Path, topics: Collection[str] = ()) -> Iterator[Stored]:
    """The messages of some topics, or of all, in the order in which they were written, which a clock cannot change.

    :raises Damage: where the file cannot be read further.
    """
    with _opened(path) as (database, channels):
        odd = 0
        others = ", ".join(str(key) for key, channel in channels.items() if topics and channel.topic not in topics)
        # Not by the index by time, which may be damaged where the messages are not.
        query = "SELECT topic_id, timestamp, data FROM messages NOT INDEXED WHERE topic_id IS NULL OR topic_id NOT IN"
        for key, time_ns, raw in database.execute(f"{query} ({others})"):
            if key in channels and isinstance(time_ns, int) and isinstance(raw, bytes):
                yield channels[key], time_ns, raw
            else:
                odd += 1
    if odd:
        raise Damage(f"{odd} of its rows are not messages of a topic")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[apsw.Connection, dict[int, Channel]]]:
    """The log is copied, and what else SQLite wants beside a database lies in a temporary folder."""
    with TemporaryDirectory(prefix="bag_") as folder:
        name = Path(folder) / "bag"
        name.touch()  # SQLite takes the permissions of the log from it
        if _has_log(path):
            shutil.copyfile(f"{path}{LOG}", f"{name}{LOG}")
        files = _Files(path)
        try:
            connection = apsw.Connection(str(name), apsw.SQLITE_OPEN_READONLY, vfs=files.name)
            try:
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # else it wants shared memory beside the file
                # This also reads the statistics that writers may append, which nobody misses in a file cut short.
                connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
                files.opened = True
                yield connection, _channels(connection)
            finally:
                connection.close(True)
        except (apsw.Error, UnicodeDecodeError) as error:  # damaged text may be none
            raise Damage(f"SQLite cannot read it, or cannot read on ({error})") from error


def _channels(database: apsw.Connection) -> dict[int, Channel]:
    try:
        rows = list(database.execute("SELECT id, name, type FROM topics"))
    except apsw.SQLError as error:
        hint = f"is the file of the same name with {LOG} at its end missing, to which a recorder writes first?"
        raise Damage(f"{error}; {hint}") from error
    return {key: Channel(str(name), str(kind)) for key, name, kind in rows if isinstance(key, int)}


class _Files(apsw.VFS):
    """The database is that of the recording, all other files are what their names say.

    :ivar opened: whether what is missing at the end of the database is an error from now on.
    """

    def __init__(self, path: Path) -> None:
        self.name, self._path, self.opened = f"bag_{id(self)}", path, False
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _Database(self, self._path) if flags[0] & apsw.SQLITE_OPEN_MAIN_DB else super().xOpen(name, flags)


class _Database(apsw.VFSFile):
    """A file as long as its header says. SQLite reads no file at all that is shorter; so it learns what is missing only
    when it wants to read it. Nobody else uses it, so that it need not be locked.
    """

    def __init__(self, files: _Files, path: Path) -> None:
        self._files, self._size = files, path.stat().st_size
        super().__init__("", str(path), [apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_READONLY, 0])

    def xFileSize(self) -> int:
        header = super().xRead(100, 0) if self._size >= 100 else bytes(100)
        page = int.from_bytes(header[16:18], "big")
        # Of pages of 65536 bytes, the header says 1.
        return max(self._size, (65536 if page == 1 else page) * int.from_bytes(header[28:32], "big"))

    def xRead(self, amount: int, offset: int) -> bytes:
        if self._files.opened and 0 < self._size < offset + amount:
            raise apsw.IOError(f"nothing after byte {self._size}")
        return super().xRead(amount, offset)

    def xLock(self, level: int) -> None:
        pass

    def xUnlock(self, level: int) -> None:
        pass
