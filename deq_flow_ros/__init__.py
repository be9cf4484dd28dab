# SPDX-License-Identifier: Apache-2.0
"""Dense optical flow for camera streams by deep equilibrium models (Bai, Geng, Savani, Kolter, CVPR 2022).

Here is what all packages need: errors that are for the user to mend, not faults of the program, and what may help then.
The node needs ROS, PyTorch, numpy, OpenCV, Pillow and PyYAML, which apt has. All else is imported where it is used.
"""

from __future__ import annotations

import difflib
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

UNUSABLE, INTERRUPTED = 2, 130
"""Exit status for options or input that cannot be used, as argparse has it, and after Ctrl-C (128 + SIGINT)."""


class UserError(Exception):
    """What the user gave is wrong; the message says how, and what to do. Commands end with it in one line."""


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line that something is wrong, in red on a terminal; None is standard output."""
    stream = stream or sys.stdout
    print(f"\033[31m{text}\033[0m" if stream.isatty() else text, file=stream, flush=True)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is closest to one that is not, whatever its case.

    :returns: " (did you mean 'x'?)", or nothing where none is close.
    """
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


_APT = ("h5py", "jinja2", "matplotlib", "numpy", "pandas", "rich", "tqdm", "yaml")
INSTALL = {
    **{module: f"sudo apt install python3-{module}" for module in _APT},
    "cv2": "sudo apt install python3-opencv",
    "PIL": "sudo apt install python3-pil",
    "rclpy": "install ROS 2, then source /opt/ros/DISTRIBUTION/setup.bash",
    "torch": "pip install torch, on Jetson NVIDIA's build of it",
    # rosbags brings the other ones.
    **dict.fromkeys(("rosbags", "apsw", "backports", "lz4"), "pip install rosbags"),
}
"""How to install what provides a module."""
OLDEST_TORCH = (2, 1)


class MissingPackage(UserError):
    """A package is not installed, or too old; the message says which, what needs it, and how to install it."""


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Imports within it fail with a way out.

    :param what: what the packages are for, as the subject of a sentence: "reading a bag".
    :raises MissingPackage: for a package that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in INSTALL:
            raise
        raise MissingPackage(
            f"{what} needs the Python module {module}, which is not installed here: {INSTALL[module]}\n"
            "(into the environment of this Python, see docs/install.md)"
        ) from error


@contextmanager
def program(name: str, torch: bool = True) -> Iterator[None]:
    """Around the imports of a program, which take seconds. A package that is missing or too old ends it with a message,
    and Ctrl-C, until the program takes over the signals itself, at once: both without a traceback.

    :param torch: whether the program uses PyTorch.
    :raises SystemExit: with status 2.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from importlib import metadata  # takes longer than all that is imported above

    try:
        # An old one would fail in the middle. By its name, because importing takes seconds; without one, that tells.
        version = ""
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version("torch") if torch else ""
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            raise MissingPackage(f"{name} needs PyTorch {oldest} or newer, this is {version}: {INSTALL['torch']}")
        with needed_by(name):
            yield
    except MissingPackage as error:
        say(str(error), sys.stderr)
        raise SystemExit(UNUSABLE) from None
