# SPDX-License-Identifier: Apache-2.0
"""A thread that always works on the newest item."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class NewestFirstWorker(Generic[Item]):
    """Calls `handle(item)` for the newest item submitted, one at a time; `handle` must not raise.

    There is room for one waiting item: under overload results are late by one item at most, instead of by a queue.
    """

    def __init__(self, handle: Callable[[Item], None], name: str) -> None:
        self._handle = handle
        self._changed = threading.Condition()
        self._waiting: Item | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> Item | None:
        """Hand over an item; returns the one that it replaced, if one was still waiting."""
        with self._changed:
            replaced, self._waiting = self._waiting, item
            self._changed.notify()
        return replaced

    def stop(self) -> Item | None:
        """End the thread after the item in hand; returns the one that was still waiting, if any."""
        with self._changed:
            waiting, self._waiting = self._waiting, None
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        return waiting

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting is not None)
                if self._waiting is None:
                    return
                item, self._waiting = self._waiting, None
            self._handle(item)
