# SPDX-License-Identifier: Apache-2.0
"""A thread that works on the newest item of each of several sources, in fair turns."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Hashable
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class FairWorker(Generic[Item]):
    """Calls `handle(items)` with the newest item of one source, or of all that wait.

    An error that `handle` lets out is printed, and the thread goes on with the next items.

    Each source has room for one waiting item: under overload results are late by one round at most, instead of by a
    queue. The source served longest ago goes first, so that one that floods takes no turn of another.

    :param together: hand over the waiting items of all sources at once, in the order of their turns (for a device that
        computes them as one batch); otherwise always one.
    """

    def __init__(self, handle: Callable[[list[Item]], None], name: str, together: bool = False) -> None:
        self._handle = handle
        self._together = together
        self._changed = threading.Condition()
        self._waiting: dict[Hashable, Item] = {}
        # In the order of their last turn, the latest at the end; a source that never had one goes before all others.
        self._served: dict[Hashable, None] = {}
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, source: Hashable, item: Item) -> Item | None:
        """Hand over an item; returns the one of the same source that it replaced, if one was still waiting."""
        with self._changed:
            replaced = self._waiting.get(source)
            self._waiting[source] = item
            self._changed.notify()
        return replaced

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting and not self._jobs

    def call(self, job: Callable[[], Result], timeout_s: float) -> Result:
        """Run `job` in the thread, between two items, and return what it does.

        Raises what it raises, and TimeoutError when it has not ended in time; if it has not begun by then, it never
        will.
        """
        future: Future[Result] = Future()
        with self._changed:
            self._jobs.append((future, job))
            self._changed.notify()
        try:
            return future.result(timeout_s)
        except futures.TimeoutError as error:  # another class than TimeoutError before Python 3.11
            raise TimeoutError(f"not done within {timeout_s:g} s") from error
        finally:
            future.cancel()

    def withdraw(self) -> list[Item]:
        """Take back all items that are still waiting."""
        with self._changed:
            waiting, self._waiting = list(self._waiting.values()), {}
        return waiting

    def stop(self) -> list[Item]:
        """End the thread after the items in hand; returns those that were still waiting."""
        waiting = self.withdraw()
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        return waiting

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._jobs or self._waiting)
                job = self._jobs.popleft() if self._jobs else None
                if job is None and not self._waiting:
                    return
                items = [] if job else self._next_items()
            if job:
                _run_job(*job)
                continue
            try:
                self._handle(items)
            except Exception:  # without this thread there would be no result any more, and nobody would know
                traceback.print_exc()

    def _next_items(self) -> list[Item]:
        turns = [*(source for source in self._waiting if source not in self._served), *self._served]
        sources = [source for source in turns if source in self._waiting]
        if not self._together:
            del sources[1:]
        for source in sources:
            self._served.pop(source, None)
            self._served[source] = None
        return [self._waiting.pop(source) for source in sources]


def _run_job(future: Future[Result], job: Callable[[], Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
