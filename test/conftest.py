# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Before any test module imports torch: one thread here and in each child process. The tests share the machine, and a
# second thread that waits for a busy core is slower than none.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def ros_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """See `set_ros_environment`."""
    set_ros_environment(tmp_path_factory.mktemp("ros_log"))


def set_ros_environment(log_folder: Path) -> None:
    """ROS of this run alone: a domain of its own, on this machine, with its own logs and our transport profile."""
    os.environ["ROS_DOMAIN_ID"] = str(10 + os.getpid() % 80)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_LOG_DIR"] = str(log_folder)
    os.environ["FASTRTPS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds.xml")
    os.environ.setdefault("AMENT_PREFIX_PATH", sys.prefix)
    # Child processes find the package whether or not it is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
