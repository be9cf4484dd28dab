# SPDX-License-Identifier: Apache-2.0
"""The board between the node and the browsers: the latest pictures and figures, and who has looked at them lately."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LOOKING_S = 3.0
"""For so long after a request its pictures count as looked at; a page that is open asks at least once a second."""


class Board:
    """Holds the latest of everything; nothing queues up for anybody. Callable from any thread.

    A browser asks again when it has drawn what it got, so that a slow one leaves pictures out, and one that is gone
    leaves nothing behind.

    :param clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._number = 0
        self._closed = False
        self._figures: dict[str, Any] = {}
        self._pictures: dict[str, tuple[int, dict[str, str]]] = {}
        self._looked_s: dict[str, float] = {}

    def looked_at(self) -> set[str]:
        """Names of the pictures that somebody looks at now."""
        with self._changed:
            return {name for name, at_s in self._looked_s.items() if self._clock() - at_s < LOOKING_S}

    def put_up(self, figures: dict[str, Any], pictures: Mapping[str, dict[str, str]]) -> None:
        """Replace the figures, and the pictures given; whoever waits gets them.

        :param pictures: by name, as ``pictures.Pictures.draw`` makes them.
        """
        with self._changed:
            self._number += 1
            self._figures = figures
            self._pictures.update({name: (self._number, picture) for name, picture in pictures.items()})
            self._changed.notify_all()

    def clear(self) -> None:
        """Take everything down, so that nobody who comes later sees what is long past."""
        with self._changed:
            self._figures, self._pictures = {}, {}

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def look(self, after: int, names: Iterable[str], timeout_s: float) -> dict[str, Any]:
        """The figures, and those pictures of the names that are newer than the number ``after``.

        Waits until there is something newer, for at most ``timeout_s``.

        :returns: the figures, with the keys ``number`` (the ``after`` of the next look) and ``pictures``.
        """
        with self._changed:
            names = list(names)
            self._looked_s.update(dict.fromkeys(names, self._clock()))
            if after > self._number:  # of a process before this one
                after = 0
            self._changed.wait_for(lambda: self._closed or self._number > after, timeout_s)
            known = {name: self._pictures[name] for name in names if name in self._pictures}
            newer = {name: picture for name, (number, picture) in known.items() if number > after}
            return {**self._figures, "number": self._number, "pictures": newer}
