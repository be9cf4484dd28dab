# SPDX-License-Identifier: Apache-2.0
"""Child processes that never outlive their parent, each with a log file that is quoted when it fails."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ChildError(Exception):
    """A child process ended too early, with an error, or not at all when asked to; the message quotes its log."""


class Children:
    """Runs modules of this package as processes; leaving the ``with`` block ends those that still run.

    :param log_directory: for what they print.
    """

    def __init__(self, log_directory: Path) -> None:
        self._log_directory = log_directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Children:
        self._log_directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        give_up = time.monotonic() + 5.0
        while time.monotonic() < give_up and any(process.poll() is None for process in running):
            time.sleep(0.05)
        for process in running:
            process.kill()  # does nothing to one that has ended
            process.wait()

    def start(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """Run ``python -m module arguments...`` as the child ``name``, with its output in ``<name>.log``."""
        library = ctypes.CDLL(None)

        def die_with_parent() -> None:
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        with self.log(name).open("wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches the parent alone, which ends its children in order.
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def log(self, name: str) -> Path:
        """Log file of a child."""
        return self._log_directory / f"{name}.log"

    def running(self, name: str) -> bool:
        """Whether a child still runs."""
        return self._processes[name].poll() is None

    def pid(self, name: str) -> int:
        """Process id of a child, whether it still runs or not."""
        return self._processes[name].pid

    def check(self) -> None:
        """Look after the children.

        :raises ChildError: for one that has ended with an error.
        """
        for name, process in self._processes.items():
            if process.poll() not in (None, 0):
                raise self.failure(name, f"ended with status {process.returncode}")

    def stop(self, name: str, timeout_s: float) -> None:
        """Send SIGINT, then wait.

        :raises ChildError: when the child does not end in time, or ends with an error.
        """
        process = self._processes[name]
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        self.wait(name, timeout_s)

    def kill(self, name: str) -> None:
        """End a child at once, as a crash would, and forget it."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def wait(self, name: str, timeout_s: float) -> None:
        """Wait for the end of a child.

        :raises ChildError: as ``stop`` does.
        """
        process = self._processes[name]
        try:
            status = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise self.failure(name, f"did not end within {timeout_s:g} s") from None
        if status != 0:
            raise self.failure(name, f"ended with status {status}")

    def failure(self, name: str, what: str, lines: int = 12) -> ChildError:
        """The error to raise for a child; ``what`` says what it did. It quotes the end of the child's log."""
        time.sleep(0.05)  # the last lines may still be on their way
        try:
            tail = self.log(name).read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            tail = []
        quoted = "\n".join(f"  | {line}" for line in tail) or "  | (nothing)"
        return ChildError(f"{name} {what}; the end of {self.log(name)}:\n{quoted}")
