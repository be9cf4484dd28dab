# SPDX-License-Identifier: Apache-2.0
"""How long a run has taken over all its starts, kept on disk so that even SIGKILL loses no more than a second of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

FILE = "seconds.txt"
EVERY_SECONDS = 1.0


class Clock:
    """The time of a run: that of its earlier starts, and of this one. Time in between does not count.

    :param before: seconds of the earlier starts.
    :param began: when this start began, by `now`; None is at this moment.
    :param now: a clock in seconds.
    """

    def __init__(
        self, before: float = 0.0, began: float | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now, self._began = now, (now() if began is None else began) - before
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None

    def seconds(self) -> float:
        """Time of the run up to now."""
        return self._now() - self._began

    def keep(self, out: Path) -> None:
        """Write the time into the folder of the run, now and every second until ``close``.

        Checkpoints are minutes apart. What was trained since the last one is lost when a run is killed, but the time it
        took was spent.
        """
        self._write(out)
        self._keeper = threading.Thread(target=self._keep, args=(out,), daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """Write the time once more, and stop writing it."""
        self._ended.set()
        if self._keeper is not None:
            self._keeper.join()

    def _keep(self, out: Path) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self._write(out)
        self._write(out)

    def _write(self, out: Path) -> None:
        temporary = out / f".{FILE}"
        try:
            temporary.write_text(f"{self.seconds():.2f}\n")
            temporary.replace(out / FILE)
        except OSError:
            pass  # a full disk is for the next checkpoint to report; the time is in there, too


def kept_seconds(out: Path) -> float:
    """The time that was last written into the folder of a run; 0 if none was, or if it cannot be read."""
    try:
        return float((out / FILE).read_text())
    except (OSError, ValueError):
        return 0.0


def process_age() -> float:
    """Seconds since this process was started: importing PyTorch alone takes some. 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
