# SPDX-License-Identifier: Apache-2.0
"""How long a run lasts, and its learning rate as a function of the step or of the time, so that it resumes anywhere.

How long it has taken over all its starts is kept on disk, so that even SIGKILL loses no more than a second of it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deq_flow_ros.host import replacing

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class RecipeError(ValueError):
    """A recipe that cannot be used, and why."""


def check(section: str, **checks: tuple[Any, bool, str]) -> None:
    """Refuse values of a section of a recipe: each with whether it may be used, and what is expected.

    :raises RecipeError: for the first that may not.
    """
    for name, (value, ok, expected) in checks.items():
        if not ok:
            raise RecipeError(f"{section}.{name}: expected {expected}, got {value}")


@dataclass(frozen=True)
class Schedule:
    """How long is trained, and at what rate.

    The length is a number of steps, or a time. With a time, every share below is a share of the time.

    :ivar kind: "constant": the rate rises for ``warmup`` steps, then stays, then falls to zero over ``cooldown`` steps.
        The cool-down branches off: the constant-rate checkpoint stays as it is, so that the run can be continued any
        number of times and cooled down whenever weights are wanted. It has no end in time. "trapezoid": the rate rises
        for ``warmup`` steps, stays until the share ``stable`` of the run, then falls linearly to zero at its end (also
        known as warmup-stable-decay, arXiv 2404.06395). "one-cycle": up and down in straight lines over the whole run
        (Smith and Topin, arXiv 1708.07120), as RAFT trains (arXiv 2003.12039).
    :ivar steps: of the whole run; for a constant rate, of the part before the cool-down.
    :ivar seconds: time of the whole run instead of ``steps``, over all its starts: from the start of the process, with
        loading, validation and saving.
    :ivar rate: the largest learning rate.
    :ivar warmup: steps of rising rate; not for "one-cycle".
    :ivar cooldown: steps of falling rate after ``steps``, "constant" only.
    :ivar stable: share of the run after which the rate falls, "trapezoid" only.
    :ivar rise: share of the run in which the rate rises, "one-cycle" only.
    """

    kind: Literal["constant", "trapezoid", "one-cycle"] = "constant"
    steps: int = 20_000
    seconds: float | None = None
    rate: float = 5e-4
    warmup: int = 200
    cooldown: int = 0
    stable: float = 0.6
    rise: float = 0.05

    def __post_init__(self) -> None:
        check(
            "schedule",
            steps=(self.steps, self.steps >= 1, "at least 1"),
            seconds=(self.seconds, self.seconds is None or self.seconds > 0, "above 0"),
            rate=(self.rate, 0 < self.rate < 1, "between 0 and 1"),
            warmup=(self.warmup, self.warmup >= 0, "at least 0"),
            cooldown=(self.cooldown, self.cooldown >= 0, "at least 0"),
            stable=(self.stable, 0 <= self.stable < 1, "from 0 to below 1"),
            rise=(self.rise, 0 < self.rise < 1, "between 0 and 1"),
        )
        if self.kind != "constant" and self.cooldown:
            raise ValueError(f"schedule.cooldown: a {self.kind} schedule has none, got {self.cooldown}")
        if self.kind == "constant" and self.seconds is not None:
            raise ValueError(
                "schedule.seconds (--for): a constant rate has no end in time; choose schedule.kind=trapezoid or "
                "schedule.kind=one-cycle"
            )

    @property
    def total(self) -> int:
        """All steps of a run that is not timed."""
        return self.steps + self.cooldown

    def rate_at(self, step: int, progress: float | None = None) -> float:
        """Rate of the step that begins at ``step``, counted from 0.

        :param progress: share of the time that has passed, 0 to 1, for a timed schedule.
        """
        if self.kind == "one-cycle":
            # The end points of PyTorch's OneCycleLR by default: rate / 25 at the start, 1e-4 of that at the end.
            first = self.rate / 25
            peak, last = max(self.rise * self.steps - 1, 0.0), float(self.steps - 1)
            position = float(step)
            if progress is not None:
                peak, last, position = self.rise, 1.0, progress
            return float(np.interp(position, (0, peak, last), (first, self.rate, first * 1e-4)))
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.kind == "trapezoid":
            done = step / self.steps if progress is None else progress
            return self.rate * min(rising, max(0.0, (1 - done) / (1 - self.stable)))
        if step >= self.steps:
            return self.rate * max(0.0, 1 - (step - self.steps) / max(self.cooldown, 1))
        return self.rate * rising

    def checkpoint_name(self, step: int) -> str:
        """The file that holds the state after ``step`` steps."""
        if self.kind != "constant":
            return f"{self.kind.replace('-', '_')}.pt"
        return "constant.pt" if step <= self.steps else "cooldown.pt"


def parse_duration(text: str) -> float:
    """Seconds of a time such as ``90s``, ``28m`` or ``1.5h``.

    :raises ValueError: if it is not such, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ValueError(f"expected a time above 0 as 90s, 28m or 1.5h, got {text!r}")
    return seconds


FILE = "seconds.txt"
EVERY_SECONDS = 1.0


class Clock:
    """The time of a run: that of its earlier starts, and of this one. Time in between does not count.

    :param before: seconds of the earlier starts.
    :param began: when this start began, by ``now``; None is at this moment.
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
        # A full disk is for the next checkpoint to report; the time is in there, too.
        with suppress(OSError), replacing(out / FILE, flush=False) as temporary:
            temporary.write_text(f"{self.seconds():.2f}\n")


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
