# SPDX-License-Identifier: Apache-2.0
"""Commands in processes of their own, forked: what is imported here need not be imported there, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path

Main = Callable[[list[str]], int]


def start(main: Main, arguments: Sequence[object], log: Path, **variables: str) -> ForkProcess:
    """Run a command's ``main``; what it says goes to a file, its exit status is ``exitcode``, -9 if it was killed.

    :param variables: of its environment, besides those of this process.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(main, [str(a) for a in arguments], log, variables), daemon=True
    )
    process.start()
    return process


def _run(main: Main, arguments: list[str], log: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    # pytest's own streams lead elsewhere. Line by line, as a killed process says no more.
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(arguments))


def together(main: Main, arguments: Sequence[object], log: Path, timeout_s: float = 240.0) -> str:
    """Run a command in two processes that know of each other as those of `torchrun` do; returns what both said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(2)]
    processes = [
        start(main, arguments, logs[rank], RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)
    ]
    for process in processes:
        process.join(timeout_s)
    said = "".join(file.read_text() for file in logs)
    status = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert status == [0, 0], said
    return said
