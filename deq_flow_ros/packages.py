# SPDX-License-Identifier: Apache-2.0
"""Packages that a machine may lack: what needs them, and how to install them, instead of a bare ModuleNotFoundError.

The node needs ROS, PyTorch, numpy, OpenCV, Pillow and PyYAML, which apt has. All else is imported where it is used.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from deq_flow_ros.command_line import INTERRUPTED, UNUSABLE, say
from deq_flow_ros.errors import UserError

_APT = {"cv2": "opencv", "PIL": "pil", "yaml": "yaml"} | {
    name: name for name in ("h5py", "jinja2", "matplotlib", "numpy", "pandas", "rich", "tqdm")
}
"""Modules by what comes after ``python3-`` in the names of Ubuntu's packages."""
_BAGS = "pip install rosbags"
INSTALL = {
    **{module: f"sudo apt install python3-{package}" for module, package in _APT.items()},
    "rclpy": "install ROS 2, then source /opt/ros/DISTRIBUTION/setup.bash",
    "torch": "pip install torch, on Jetson NVIDIA's build of it",
    # rosbags brings the other ones.
    **dict.fromkeys(("rosbags", "apsw", "backports", "lz4"), _BAGS),
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
    """Around the imports of a program, which take seconds: a package that is missing or too old, or Ctrl-C, ends it
    with a message, not a traceback.

    :param torch: whether the program uses PyTorch.
    :raises SystemExit: with status 2, of Ctrl-C with 130.
    """
    try:
        if torch:
            _check_torch(name)
        with needed_by(name):
            yield
    except MissingPackage as error:
        say(str(error), sys.stderr)
        raise SystemExit(UNUSABLE) from None
    except KeyboardInterrupt:
        say(f"{name}: interrupted", sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _check_torch(what: str) -> None:
    """Refuse an old PyTorch before it fails in the middle; by its name, because importing takes seconds.

    :raises MissingPackage: below ``OLDEST_TORCH``.
    """
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return  # missing, or built here without a name: importing tells
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise MissingPackage(f"{what} needs PyTorch {oldest} or newer, this is {version}: {INSTALL['torch']}")
