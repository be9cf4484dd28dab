# SPDX-License-Identifier: Apache-2.0
"""What ``ros2 launch`` does not check: names of arguments. Imported by launch files only, as it needs ``launch``."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.launch_description_sources import get_launch_description_from_python_launch_file

from deq_flow_ros.spelling import did_you_mean
from launch import LaunchContext, LaunchDescriptionEntity


def refuse_unknown(context: LaunchContext, file: str) -> list[LaunchDescriptionEntity]:
    """Refuse an argument of the command line that a launch file does not have, which ``ros2 launch`` passes over.

    For use in an ``OpaqueFunction``. A file that another one includes gets that one's arguments as well, so only the
    file that the command line names is checked.

    :param file: the ``__file__`` of the launch file.
    :raises RuntimeError: naming the argument, and what may have been meant.
    """
    if Path(file).name not in [Path(word).name for word in sys.argv]:
        return []
    known = [argument.name for argument in get_launch_description_from_python_launch_file(file).get_launch_arguments()]
    for word in sys.argv:
        name, assigned, _ = word.partition(":=")
        if assigned and name not in known:
            raise RuntimeError(f"no argument {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")
    return []
