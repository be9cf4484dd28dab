# SPDX-License-Identifier: Apache-2.0
"""The workspaces of an engine: made when a size is met, kept while it is in use."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

from deq_flow_ros.streaming.graphs.workspace import Size, Workspace

KEPT = 6
"""Workspaces at most: the sizes that a stream changes between, alone and in a batch."""
MET = 3
"""A size that was asked for so often has a stream; two frames may be all that somebody has."""

LOG = logging.getLogger(__name__)


class Shelf:
    """See the module.

    :param make: makes a workspace; slow. What it raises leaves the size without one.
    :param kept: the one that was not asked for the longest goes when there are more.
    :param behind: whether those that streams ask for are made by a thread of their own, while the streams go on.
    :ivar failures: by size, why there is no workspace.
    """

    def __init__(self, make: Callable[[Size], Workspace], kept: int = KEPT, behind: bool = True) -> None:
        self._make, self._kept, self._behind = make, kept, behind
        self._spaces: OrderedDict[Size, Workspace] = OrderedDict()
        self._met: Counter[Size] = Counter()
        self._used: set[Size] = set()  # since the last one was made
        self._lock, self._making = threading.RLock(), threading.Lock()
        self._thread: threading.Thread | None = None
        self.failures: dict[Size, str] = {}

    def get(self, size: Size) -> Workspace | None:
        """The workspace for a size; None as long as there is none."""
        with self._lock:
            if size not in self._spaces:
                self._met[size] += 1
                # Where all are in use, as by more cameras than there is room for, one more would push out another.
                full = len(self._spaces) >= self._kept and self._used.issuperset(self._spaces)
                if self._met[size] >= MET and size not in self.failures and not full:
                    self._request(size)
            space = self._spaces.get(size)
            if space is not None:
                self._spaces.move_to_end(size)
                self._used.add(size)
            return space

    def has(self, size: Size) -> bool:
        """Whether there is one, without asking for it."""
        with self._lock:
            return size in self._spaces

    def make(self, size: Size) -> None:
        """Make the workspace for a size now, unless there is one, or there was a failure."""
        with self._making:
            if self.has(size) or size in self.failures:
                return
            try:
                space = self._make(size)
            except Exception as error:  # whatever it is: without graphs the frames are still computed
                LOG.warning("no graphs for %s, which stay eager: %s", size, error, exc_info=True)
                with self._lock:
                    self.failures[size] = first_line(error)
                return
            with self._lock:
                self._spaces[size] = space
                self._used.clear()
                while len(self._spaces) > self._kept:
                    self._spaces.popitem(last=False)

    def clear(self) -> None:
        """Give all of them back, when those in the making are made."""
        thread = self._thread
        if thread is not None:
            thread.join()
        with self._lock:
            self._spaces.clear()
            self._met.clear()
            self.failures.clear()

    def __len__(self) -> int:
        with self._lock:
            return len(self._spaces)

    def _request(self, size: Size) -> None:
        if not self._behind:
            self.make(size)
        elif self._thread is None or not self._thread.is_alive():  # one at a time; another is asked for again
            self._thread = threading.Thread(target=self.make, args=(size,), name="graphs")
            self._thread.start()


def first_line(error: Exception) -> str:
    """An error for a log: its kind, and the first of what are often many lines."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
