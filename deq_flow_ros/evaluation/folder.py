# SPDX-License-Identifier: Apache-2.0
"""The folder of a recording's results: who may write there, and what an interrupted run goes on from."""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from deq_flow_ros.evaluation.output_bag import TOPICS
from deq_flow_ros.evaluation.report import RESULTS
from deq_flow_ros.evaluation.results import write_text
from deq_flow_ros.media.bags import remove_recording
from deq_flow_ros.media.frame import MediaError

STATE = ".run"
"""Folder beside the results with what an interrupted run goes on from."""
CHECKPOINT = "checkpoint.npz"
"""In it: arrays, as `numpy.savez` writes them."""
LOCK = "lock"
THREADS = "number of threads"
"""In an identity: it decides on the last bits of the flow, and on how long it took."""
BAG = "flow"


class OccupiedError(MediaError):
    """The folder holds something that nobody has allowed to replace."""


def has_begun(path: Path) -> bool:
    """Whether a run has begun to write its results there."""
    return (path / STATE / "run.json").is_file()


def refuse_foreign(path: Path, names: Iterable[str]) -> None:
    """Raises `OccupiedError` where the folder holds any of these: the caller knows of no run that made them."""
    if taken := [name for name in names if (path / name).exists()]:
        raise OccupiedError(
            f"the folder {path} holds {', '.join(taken)}, which no run of this kind is known to have written; move it "
            "away, or choose another --out"
        )


class ResultFolder:
    """A folder for the results of one run, which it holds alone until `close`.

    :param identity: what the results depend on, plain values; a run goes on only where it is the same.
    :param resume: go on with what an interrupted run left there; complete results are left as they are.
    :param overwrite: replace results that are there.
    :raises OccupiedError: where something else is there, or another process is at work.
    :raises MediaError: where nothing can be written.

    :ivar complete: whether the results are there already.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.state = path, path / STATE
        self._identity = dict(identity)
        self.complete = False
        self._lock: IO[str] | None = None
        try:
            if self.state.is_dir():
                self._hold()
            if path.is_dir():
                self._take_over(resume, overwrite)
            self.state.mkdir(parents=True, exist_ok=True)
            self._hold()
            if not self.complete:
                self._write_state(complete=False)
        except (OSError, ValueError) as error:
            self.close()
            raise MediaError(f"cannot write to {path}: {error}") from error
        except MediaError:
            self.close()
            raise

    def _hold(self) -> None:
        """Lock the folder: two runs in one would mix their frames. The lock ends with the process at the latest."""
        if self._lock is not None:
            return
        self._lock = (self.state / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OccupiedError(f"another run writes to {self.path}; wait for it, or choose another --out") from None

    def close(self) -> None:
        """Let others at it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_over(self, resume: bool, overwrite: bool) -> None:
        path, state = self.path, self.state / "run.json"
        before = json.loads(state.read_text()) if state.is_file() else None
        if before is None:
            self._check_foreign(overwrite)
            return
        if resume:
            self.complete = bool(before["complete"])
            other = [name for name, value in self._identity.items() if before.get(name) != value]
            if self.complete and other == [THREADS]:
                return  # there is nothing to go on with
            if other:
                threads = f" ({before.get(THREADS)}; see --threads)" if THREADS in other else ""
                raise OccupiedError(
                    f"the run in {path} had another {' and '.join(other)}{threads}; repeat its options, choose another "
                    "--out, or start anew with --overwrite"
                )
            return
        if not overwrite:
            what, hint = "an interrupted run", "--resume goes on with it, --overwrite starts anew"
            if before["complete"]:
                what, hint = "the results of a run", "--overwrite replaces them"
            raise OccupiedError(f"the folder {path} holds {what}; {hint}, or choose another --out")
        self._remove()

    def _check_foreign(self, overwrite: bool) -> None:
        """Results may stand beside what somebody else put there, where that is allowed, but never in its place."""
        refuse_foreign(self.path, (*RESULTS, BAG))
        there = sorted(child.name for child in self.path.iterdir() if child.name != STATE)
        if there and not overwrite:
            raise OccupiedError(
                f"the folder {self.path} exists and holds {', '.join(there[:4])}; choose another --out, or --overwrite "
                "to write beside them"
            )

    def _remove(self) -> None:
        """Remove results, and nothing else that may be in the folder. Raises `MediaError` for somebody else's bag."""
        bag = self.path / BAG
        if bag.is_dir() and not any(bag.iterdir()):
            bag.rmdir()
        remove_recording(bag, TOPICS)
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)
        for child in self.state.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != LOCK:
                child.unlink()

    def _write_state(self, complete: bool) -> None:
        write_text(self.state / "run.json", json.dumps({**self._identity, "complete": complete}))

    def finish(self) -> None:
        """Everything is written: nothing is left to go on with."""
        shutil.rmtree(self.state / "previews", ignore_errors=True)
        (self.state / CHECKPOINT).unlink(missing_ok=True)
        self._write_state(complete=True)

    def load(self) -> dict[str, np.ndarray]:
        """The arrays of the last `save`; none where there was none. Raises `MediaError` where they cannot be read."""
        path = self.state / CHECKPOINT
        if not path.is_file():
            return {}
        try:
            with zipfile.ZipFile(path) as archive:  # np.load compares no checksum of an array that it reads in part
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise self.unusable(error) from error

    def unusable(self, why: object) -> MediaError:
        """That nothing can go on from what was kept, and what to do."""
        return MediaError(f"{self.state / CHECKPOINT} is damaged ({why}); --overwrite starts anew")

    def save(self, arrays: dict[str, Any]) -> None:
        """Keep arrays to go on from, in place of those before. Raises `MediaError` where the disk is full."""
        coded = io.BytesIO()
        np.savez(coded, **arrays)
        partial = self.state / "checkpoint.partial"
        try:
            partial.write_bytes(coded.getvalue())
            partial.replace(self.state / CHECKPOINT)
        except OSError as error:
            kept = "what is there so far is kept, and --resume goes on with it"
            raise MediaError(f"cannot write {partial}: {error}; {kept}") from error
