# SPDX-License-Identifier: Apache-2.0
"""ROS for a run of tests: a domain that no other process on this machine has, its own logs, our transport profile."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parent.parent

DOMAINS = range(10, 100)
"""ROS domains for tests. Linux has ports for those up to 101; those below 10 are what people use by hand."""


def set_ros_environment(log_folder: Path) -> None:
    """ROS of this run alone: a domain of its own, on this machine, with its own logs and our transport profile."""
    os.environ["ROS_DOMAIN_ID"] = str(take_domain())
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_LOG_DIR"] = str(log_folder)
    os.environ["FASTRTPS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds.xml")
    os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
    # Child processes find the package whether or not it is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


_taken: list[TextIO] = []  # open, and so locked, until this process ends


def take_domain() -> int:
    """A ROS domain that no other test process on this machine has, be it of this run or of another one.

    :raises RuntimeError: where all are taken.
    """
    for domain in DOMAINS:
        try:
            lock = open(Path(tempfile.gettempdir()) / f"deq_flow_ros_test_domain_{domain}", "w")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # taken, or another user's
            continue
        _taken.append(lock)
        return domain
    raise RuntimeError(f"all ROS domains from {DOMAINS[0]} to {DOMAINS[-1]} are in use by tests; end some of them")
