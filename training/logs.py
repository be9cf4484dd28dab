# SPDX-License-Identifier: Apache-2.0
"""What a run tells: lines of JSON, TensorBoard, and the progress bar with the time left; and how long it has taken."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from deq_flow_ros.host import replacing

SHOWN = ("epe_cold", "epe_warm", "matching", "waiting")


class Log:
    """The figures of a run: ``log.jsonl``, TensorBoard, and a bar of running means. Not ``active``, it does nothing.

    A run that was killed logs the steps since its last checkpoint twice, with the same figures.

    :param step, total: where the run stands, and where it ends; None if it is the time that ends it.
    :param every: steps from one line of their means to the next.
    """

    def __init__(
        self, out: Path, step: int, total: int | None, every: int, tensorboard: bool, active: bool = True
    ) -> None:
        self._active, self._every = active, every
        self._since_last: list[dict[str, float]] = []
        self._running: dict[str, float] = {}
        self._board = None
        if not active:
            return
        out.mkdir(parents=True, exist_ok=True)
        self._file = (out / "log.jsonl").open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
        self._bar = tqdm(
            total=total, initial=step, unit="step", mininterval=2, dynamic_ncols=True, disable=None, file=sys.stderr
        )

    def step(self, step: int, figures: dict[str, float], counts: dict[str, float], left: str = "") -> None:
        """What one step tells; ``step`` counts it in.

        :param figures: of which means are written.
        :param counts: written as they are: how far the run has come.
        :param left: the time left, in words.
        """
        if not self._active:
            return
        self._since_last.append(figures)
        self._running = {k: v + 0.98 * (self._running.get(k, v) - v) for k, v in figures.items()}
        self._bar.update()
        shown = {k: f"{self._running[k]:.3g}" for k in SHOWN if k in self._running}
        self._bar.set_postfix(shown | ({"left": left} if left else {}), refresh=False)
        if step % self._every == 0:
            means = {k: float(np.mean([entry[k] for entry in self._since_last])) for k in figures}
            self._since_last = []
            self._write({"step": step, **counts, **{k: float(f"{v:.7g}") for k, v in means.items()}})
            self._scalars("training", step, means | counts)

    def validation(self, step: int, errors: dict[str, float], best: bool, picture: np.ndarray | None) -> None:
        """Endpoint errors in px per set, whether they are the best so far, and a picture (H, W, 3) uint8 RGB."""
        if not self._active:
            return
        self._write({"step": step, "validation": {k: round(v, 4) for k, v in errors.items()}, "best": best})
        self._scalars("validation", step, errors)
        if self._board is not None and picture is not None:
            self._board.add_image("validation/first pair: image, truth, flow, error", picture, step, dataformats="HWC")
        text = "  ".join(f"{name} {error:.2f}" for name, error in errors.items())
        self._bar.write(f"step {step}  endpoint error, px: {text}{'  (best so far)' if best else ''}", file=sys.stdout)

    def close(self) -> None:
        """Write what is left."""
        if not self._active:
            return
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def _scalars(self, group: str, step: int, figures: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{group}/{name}", value, step)


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

        Of what was trained since the last checkpoint when a run is killed, the time was spent.
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
