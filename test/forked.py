# SPDX-License-Identifier: Apache-2.0
"""Commands in processes of their own, forked: what is imported here need not be imported there, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path

Main = Callable[[list[str]], int]


def start(main: Main, arguments: Sequence[object], log: Path) -> ForkProcess:
    """Run a command's ``main``; what it says goes to a file, its exit status is ``exitcode``, -9 if it was killed."""
    command = [str(argument) for argument in arguments]
    process = multiprocessing.get_context("fork").Process(target=_run, args=(main, command, log), daemon=True)
    process.start()
    return process


def _run(main: Main, arguments: list[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    # pytest's own streams lead elsewhere. Line by line, as a killed process says no more.
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(arguments))
