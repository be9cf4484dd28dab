# SPDX-License-Identifier: Apache-2.0
"""What every benchmark does: read its options, measure, print tables, draw, and write the figures with their origin."""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from deq_flow_ros import say
from deq_flow_ros.command_line import CommandLine, exit_status, set_threads
from deq_flow_ros.host import machine, versions
from deq_flow_ros.streaming import FlowEstimator

# Matplotlib and the writer of files are imported where they are used: a machine with a card may not have them.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOK: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e2e8f0",
}  # fmt: skip
Row = dict[str, Any]
Measure = Callable[[argparse.Namespace, Console], Row]


class Benchmark(CommandLine):
    """The command line of a benchmark: the options that all of them have, and how it is run.

    :param file: the file of the benchmark's module.
    :param about: its docstring.
    :param device: whether the benchmark can also run on a GPU.
    :param plot: what ``--plot`` draws; empty if there is nothing to draw.
    :param threads: as in ``add_threads``.
    """

    def __init__(
        self, file: str, about: str | None, *, device: bool = True, plot: str = "", threads: int | None = None
    ) -> None:
        super().__init__(f"python -m benchmarks.{Path(file).stem}", about)
        if device:
            self.add_device()
        self.add_threads(threads)
        if plot:
            self.add_argument("--plot", type=_picture_path, help=f"draw {plot} (.png, .svg, .jpg)", metavar="OUT")
        self.add_path("--json", "write everything to this file", metavar="OUT")

    def run(self, options: argparse.Namespace, measure: Measure) -> int:
        """Measure, write the file that ``--json`` asks for, and return the exit status, which is 1 if there are
        "problems".

        :param measure: prints the figures, and returns them by name.
        """
        console = Console(highlight=False) if Console().is_terminal else Console(width=160)  # a file has room

        def work() -> int:
            set_threads(options.threads)
            figures = measure(options, console)
            for problem in figures.get("problems", ()):
                say(problem)
            if options.json:
                from deq_flow_ros.recordings.files import write_json

                write_json(options.json, {**origin(options), **figures})
            return int(bool(figures.get("problems")))

        return exit_status(work)


def _picture_path(text: str) -> Path:
    if not text.endswith((".png", ".svg", ".jpg")):  # found out at the end, it would cost the whole run
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, .svg or .jpg, got {text}")
    return Path(text)


def origin(options: argparse.Namespace) -> Row:
    """Where the figures come from: commit, machine, device, threads, versions and options."""
    device = torch.device(getattr(options, "device", "cpu"))
    processor = platform.processor() or platform.machine()
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return {
        "commit": commit, "machine": machine(), "threads": torch.get_num_threads(), "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "options": {name: str(value) for name, value in vars(options).items()},
    }  # fmt: skip


def clock_s(device: torch.device) -> float:
    """A time in s: of the processor on a CPU, so that other processes do not count; on a GPU as ``wall_s``."""
    return wall_s(device) if device.type == "cuda" else time.process_time()


def wall_s(device: torch.device) -> float:
    """Wall time in s, of a GPU after its queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copies_per_field(estimator: FlowEstimator, frames: Sequence[np.ndarray]) -> str:
    """How many copies of each kind a field takes on a CUDA device, by the profiler; empty on any other device.

    :param estimator: of a stream that has begun.
    :param frames: at least two frames of its size, which are taken in turn.
    """
    device = estimator.model.device
    if device.type != "cuda":
        return ""

    def fields(numbers: range) -> None:
        for number in numbers:
            estimator.update(frames[number % 2], 10**12 + number * 33_000_000)  # later than any stamp before
            estimator.prepare()
        torch.cuda.synchronize(device)

    fields(range(3))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        fields(range(3, 7))
    counts = {
        kind: sum(event.count for event in profiler.key_averages() if event.key.startswith(kind)) / 4
        for kind in ("Memcpy DtoH", "Memcpy HtoD", "Memset")
    }
    return ", ".join(f"{count:g} {kind}" for kind, count in counts.items() if count)


def watched(rows: Iterable[Row], console: Console, label: str) -> list[Row]:
    """Return all rows; meanwhile, a terminal shows the last by ``label``, a format string for the values of a row."""
    done = []
    with console.status("") as status:
        for row in rows:
            done.append(row)
            status.update(label.format(**row))
    return done


def grouped(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Rows by their values under these keys (a tuple, or the value of a single key), in order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return groups


def print_table(
    console: Console, title: str, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], names: int = 1
) -> None:
    """Print a table with a line for each row; a dash stands for what a row does not have, or is not finite.

    :param columns: by its heading, what a column shows: a format string, with names of values of a row in braces.
    :param names: the number of columns that name what a row describes; the others have figures.
    """
    made = Table(title=title, title_justify="left")
    for place, heading in enumerate(columns):
        made.add_column(heading, no_wrap=place < names, justify="left" if place < names else "right")
    for row in rows:
        made.add_row(*(_cell(form, row) for form in columns.values()))
    console.print(made)


class _Cell(Formatter):
    """As ``str.format``, but keys may hold dots, and be digits: numbers or strings."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        value = kwargs
        for key in re.findall(r"[^][]+", field_name):
            value = value[key] if isinstance(value, Mapping) and key in value else value[int(key)]
        return value, field_name


def _cell(form: str, row: Mapping[str, Any]) -> str:
    try:
        text = _Cell().vformat(form, (), row)
    except (LookupError, TypeError, ValueError):  # it is not there, or None
        return "-"
    return re.sub(r"\b(nan|inf|None)\b%?", "-", text) or "-"


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of the given size in inches to draw into; it is written at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
