# SPDX-License-Identifier: Apache-2.0
"""The machine and its processes: memory, signals, what a result was made with, and child processes."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory() -> None:
    """Let malloc reuse image-sized blocks; for commands to call, before they start threads, not on import.

    By default glibc maps and unmaps each one, and the page faults of a 720p image cost more than its transport. All
    threads share one heap, because one for each would keep freed memory for minutes. Other C libraries stay as is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


class StopRequest:
    """Within it, Ctrl-C and SIGTERM only set ``requested``, so that a process can finish the frame in hand.

    A plain attribute, because a lock that is taken in a signal handler can wait for itself.

    :param insist: a second signal interrupts at once, with KeyboardInterrupt. Under ``ros2 launch``, where Ctrl-C
        arrives twice, this must be False.
    """

    def __init__(self, insist: bool = False) -> None:
        self.requested = False
        self._insist = insist
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._insist and self.requested:
            raise KeyboardInterrupt
        self.requested = True


class TimeShares:
    """Where the time of a run goes: ``with shares.of("reading"): ...``; what is not named is "other"."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spent: Counter[str] = Counter()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what happens inside under this name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - began  # type: ignore[assignment]

    @property
    def seconds(self) -> float:
        """Time since the beginning, s."""
        return time.perf_counter() - self._began

    def shares(self) -> dict[str, float]:
        """Shares of the time so far, 0..1, by name."""
        named = {name: spent / max(self.seconds, 1e-9) for name, spent in self._spent.items()}
        return named | {"other": max(0.0, 1.0 - sum(named.values()))}


@contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """A temporary file to write beside ``path``, which takes its place when all of it is written.

    A crash, an error or a full disk leaves what was there before, and nothing else behind.

    :param flush: whether it has to be on the disk first, which takes some milliseconds.
    :raises OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if flush:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that its figures depend on."""
    import cv2  # its package has another name in apt than on PyPI

    found = {"python": platform.python_version(), "opencv": cv2.__version__}
    for package in ("deq_flow_ros", "torch", "numpy", "rosbags"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> str:
    """The processor, and how many of its cores this process may use."""
    name = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {name[1] if name else platform.machine()}"


def environment() -> dict[str, str | None]:
    """The variables that timing depends on: how many threads work on an operation, and how they wait; None: not set."""
    return {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class ChildError(Exception):
    """A child process ended too early, with an error, or not at all when asked to; the message quotes its log."""


class Children:
    """Runs modules of this package as processes; leaving the ``with`` block ends those that still run.

    :param log_directory: for what they print.
    :ivar processes: by their names, whether they still run or not.
    """

    def __init__(self, log_directory: Path) -> None:
        self._log_directory = log_directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Children:
        self._log_directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        running = [process for process in self.processes.values() if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        give_up = time.monotonic() + 5.0
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, give_up - time.monotonic()))
            process.kill()  # does nothing to one that has ended
            process.wait()

    def start(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """Run ``python -m module arguments...`` as the child ``name``, with its output in ``<name>.log``."""
        library = ctypes.CDLL(None)

        def die_with_parent() -> None:
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        with self.log(name).open("wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches the parent alone, which ends its children in order.
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=die_with_parent,
            )  # fmt: skip

    def log(self, name: str) -> Path:
        """The file that a child writes to."""
        return self._log_directory / f"{name}.log"

    def check(self) -> None:
        """Look after the children.

        :raises ChildError: for one that has ended with an error.
        """
        for name, process in self.processes.items():
            if process.poll() not in (None, 0):
                raise self.failure(name, f"ended with status {process.returncode}")

    def stop(self, name: str, timeout_s: float) -> None:
        """Send SIGINT, then wait.

        :raises ChildError: when the child does not end in time, or ends with an error.
        """
        process = self.processes[name]
        process.send_signal(signal.SIGINT)  # does nothing to one that has ended
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise self.failure(name, f"did not end within {timeout_s:g} s") from None
        if process.returncode:
            raise self.failure(name, f"ended with status {process.returncode}")

    def failure(self, name: str, what: str) -> ChildError:
        """The error to raise for a child; ``what`` says what it did. It quotes the end of the child's log."""
        time.sleep(0.05)  # the last lines may still be on their way
        tail = self.log(name).read_text(errors="replace").splitlines()[-12:]
        quoted = "\n".join(f"  | {line}" for line in tail) or "  | (nothing)"
        return ChildError(f"{name} {what}; the end of {self.log(name)}:\n{quoted}")
