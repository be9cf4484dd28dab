# SPDX-License-Identifier: Apache-2.0
"""How far a run is and how long it will take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress
from rich.console import Console

from deq_flow_ros.evaluation.results import PROCESSED
from deq_flow_ros.evaluation.runner import Done

LINE_S = 10.0
"""Between two lines where there is no terminal."""


class Progress:
    """Shows the frames done; use it with `with`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began: tuple[float, int] | None = None
        self._printed = time.monotonic()
        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("frames, {task.fields[latest]},"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("frames", total=None, latest="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, done: int, total: int | None, latest: Done) -> None:
        """So many frames are done, of so many if that is known."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, done
        record = latest.record
        text = f"{record.latency_ms:.0f} ms" if record.outcome == PROCESSED else record.outcome
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total, latest=text)
        elif now - self._printed > LINE_S:
            self._printed = now
            began, first = self._began
            rate = (done - first) / max(now - began, 1e-9)
            left = f", {_duration((total - done) / rate)} left" if total and rate > 0 else ""
            self._console.print(f"frame {done} of {total or 'unknown'}, {text}, {rate:.1f} frames/s{left}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
