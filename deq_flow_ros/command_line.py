# SPDX-License-Identifier: Apache-2.0
"""Command lines: what the values of options may be, options that several commands share, and how a command ends.

Needs the standard library alone, as the player does on a robot; PyTorch and OpenCV only where threads are set.
"""

from __future__ import annotations

import argparse
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeAlias

from deq_flow_ros import INTERRUPTED, UNUSABLE, UserError, did_you_mean, say

USER_ERRORS: dict[type[Exception], int] = dict.fromkeys(
    (UserError, OSError, ValueError, RuntimeError, FloatingPointError), UNUSABLE
)
"""What a user can mend, such as a file that is missing, by the exit status that it leads to."""
MOST_THREADS = 256
"""With far more, the process ends without a word."""
Kind: TypeAlias = type[int] | type[float]


class CommandLine(argparse.ArgumentParser):
    """The options of a command; the help says the default of each.

    :param command: as it is typed, such as ``python -m training.train``.
    :param about: what the command does, printed as it is written.
    """

    def __init__(self, command: str, about: str | None) -> None:
        # An abbreviation that is clear today is another option tomorrow, or is taken for one of a similar name.
        super().__init__(prog=command, description=about, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End with what is wrong. The usage of many options, which argparse prints before it, would hide it."""
        for word in re.findall(r"^unrecognized arguments: (?:.* )?(--[\w-]+)", message)[:1]:
            message += did_you_mean(word, self._option_string_actions)
        self.exit(UNUSABLE, f"{self.prog}: error: {message}\n{self.prog} --help has the options and what they mean\n")

    def add_number(
        self, name: str, default: Any, help: str, *, kind: Kind | None = None, least: float | None = None,
        above: float | None = None, most: float | None = None, **more: Any,
    ) -> None:  # fmt: skip
        """An option whose value is a number, or with ``nargs`` numbers.

        :param kind: int or float; None takes that of the default.
        :param least, above, most: see ``number``.
        :param more: for ``add_argument``.
        """
        some = default[0] if isinstance(default, Sequence) else default
        convert = number(kind or type(some), least=least, above=above, most=most)
        self.add_argument(name, type=convert, default=default, help=help, **more)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """See ``argparse.ArgumentParser``. A ``~`` that a shell left in quotes, or behind ``=``, is the home folder."""
        parsed, rest = super().parse_known_args(args, namespace)
        for name, value in vars(parsed).items():
            if isinstance(value, Path) or (isinstance(value, str) and value.startswith("~")):
                setattr(parsed, name, type(value)(os.path.expanduser(value)))
        return parsed, rest

    def add_path(self, name: str, help: str, **more: Any) -> None:
        """An option whose value is a file or folder."""
        self.add_argument(name, type=Path, help=help, **more)

    def add_model(self, help: str = "name or path of weights") -> None:
        """``--model``."""
        self.add_argument("--model", default="nano", help=help)

    def add_device(self) -> None:
        """``--device``."""
        self.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")

    def add_precision(self, choices: Sequence[str], name: str = "--precision") -> None:
        """Of weights and features; the first choice is the default."""
        self.add_argument(name, choices=choices, default=choices[0], help="of weights and features")

    def add_threads(self, default: int | None = None, help: str = "threads of PyTorch and OpenCV") -> None:
        """``--threads``, for ``set_threads``."""
        help = f"{help} (default: theirs)" if default is None else help
        self.add_number("--threads", default, help, least=1, most=MOST_THREADS, kind=int)

    def add_pairs(self, help: str = "list of pairs with true flow, see docs/datasets.md", **more: Any) -> None:
        """``--pairs``."""
        self.add_path("--pairs", help, **more)

    def add_size(self, height: int, width: int, help: str, least: int = 64, multiple: int | None = None) -> None:
        """``--height`` and ``--width`` of images, px."""
        for name, default in (("--height", height), ("--width", width)):
            kind = number(int, least=least, multiple=multiple)
            self.add_argument(name, type=kind, default=default, help=f"{name[2:]} in px, {help}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and with each option its default, unless the text has it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, "", [], argparse.SUPPRESS) or "default" in text:
            return text
        values = default if isinstance(default, (list, tuple)) else [default]
        return f"{text} (default {' '.join(map(str, values))})"


def number(
    kind: Kind, least: float | None = None, above: float | None = None, most: float | None = None,
    multiple: int | None = None,
) -> Callable[[str], Any]:  # fmt: skip
    """The ``type`` of an option whose value is a finite number: one that all these bounds allow, and larger than
    ``above``.
    """
    rules: dict[str, tuple[float | None, Callable[[Any, Any], bool]]] = {
        "a multiple of": (multiple, lambda value, bound: value % bound == 0),
        "at least": (least, operator.ge), "above": (above, operator.gt), "at most": (most, operator.le),
    }  # fmt: skip
    bounds = {f"{words} {bound:g}": (bound, holds) for words, (bound, holds) in rules.items() if bound is not None}

    def convert(text: str) -> Any:
        try:
            value: float = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {', '.join([noun, *bounds])}, got {text!r}")
        if not all(holds(value, bound) for bound, holds in bounds.values()):
            raise argparse.ArgumentTypeError(f"expected {', '.join(bounds)}, got {text}")
        return value

    return convert


def named_path(text: str) -> tuple[str, Path]:
    """The ``type`` of an option whose value is ``NAME=ROOT``, such as the folder of a data set."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"expected NAME=ROOT, got {text!r}")
    return name, Path(path)


def set_threads(threads: int | None) -> None:
    """Let PyTorch and OpenCV use so many threads; None or 0 leaves both as they are."""
    if threads:
        import cv2
        import torch

        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)


def exit_status(
    work: Callable[[], int], errors: Mapping[type[Exception], int] = USER_ERRORS, *, prefix: str = "error",
    interrupted: str = "interrupted", stream: TextIO | None = None, exactly: bool = False,
) -> int:  # fmt: skip
    """Do the work of a command; returns its exit status.

    An error that the user can mend is told in one line, in red on a terminal, and so is Ctrl-C. Any other is a fault of
    the program and shows where it comes from.

    :param work: returns the exit status if all goes well.
    :param errors: those that the user can mend, by their exit status; the first that fits counts.
    :param prefix: what the line begins with.
    :param interrupted: what Ctrl-C leads to, in words, unless the exception has some.
    :param stream: where the line goes; None is standard output.
    :param exactly: whether subclasses of ValueError and RuntimeError, unless they are among ``errors`` themselves, are
        faults of the program.
    """
    for each in (sys.stdout, sys.stderr):
        if isinstance(each, TextIOWrapper):  # names of files may have signs that a terminal cannot show
            each.reconfigure(errors="backslashreplace")
    try:
        return work()
    except KeyboardInterrupt as error:
        say(f"{prefix}: {str(error) or interrupted}", stream)
        return INTERRUPTED
    except tuple(errors) as error:
        if exactly and type(error) not in errors and not isinstance(error, (UserError, OSError)):
            raise
        say(f"{prefix}: {_words(error)}", stream)
        return next(status for kind, status in errors.items() if isinstance(error, kind))


_OF_FILES = {
    FileNotFoundError: "does not exist",
    FileExistsError: "is a file, and a folder is needed",
    NotADirectoryError: "is not in a folder: a part of it is a file",
    IsADirectoryError: "is a folder, and a file is needed",
    PermissionError: "may not be used: this user lacks the permission",
}


def _words(error: Exception) -> str:
    """What the user is told: of an error of the operating system, the file first, and no number."""
    if type(error) in _OF_FILES and isinstance(error, OSError) and error.errno and error.filename is not None:
        return f"{error.filename} {_OF_FILES[type(error)]}"
    return str(error)
