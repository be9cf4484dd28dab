# SPDX-License-Identifier: Apache-2.0
"""What a result was made from, with and on: so that it can be made again."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
from importlib import metadata
from pathlib import Path

import cv2

PACKAGES = ("deq_flow_ros", "torch", "numpy", "opencv-python-headless", "rosbags")
ENVIRONMENT = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
"""Variables that the time of an operation depends on, as they set how many threads work on it and how they wait."""


def versions() -> dict[str, str]:
    """Versions of this package and of those that the figures depend on."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # apt has OpenCV under another name
        return cv2.__version__ if package.startswith("opencv") else ""


def machine() -> str:
    """The processor, and how many cores of it this process may use."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def environment() -> dict[str, str | None]:
    """The variables of `ENVIRONMENT` as this process has them; None for one that is not set."""
    return {name: os.environ.get(name) for name in ENVIRONMENT}


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def input_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder, hexadecimal; "" for a camera.

    Raises OSError where a file cannot be read.
    """
    path = Path(path)
    if not path.exists() or path.is_block_device() or path.is_char_device():
        return ""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(child for child in path.rglob("*") if child.is_file()):
        if file != path:
            digest.update(os.fsencode(file.relative_to(path)) + b"\0")
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
