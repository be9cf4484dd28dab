# SPDX-License-Identifier: Apache-2.0
"""What the launch files share. Imported by them only, as it needs ``launch``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from launch.actions import DeclareLaunchArgument
from launch.launch_description_sources import get_launch_description_from_python_launch_file
from launch.substitutions import EnvironmentVariable

from deq_flow_ros.spelling import did_you_mean
from launch import LaunchContext, LaunchDescriptionEntity

BOOLEAN = ("true", "false")
Arguments: TypeAlias = Mapping[str, tuple[str | None, str, Sequence[str] | None]]
"""Default, description and choices by name. Without a default, the argument must be given."""
_PROFILES = "FASTRTPS_DEFAULT_PROFILES_FILE"


def declared(arguments: Arguments) -> list[DeclareLaunchArgument]:
    """Actions that declare the arguments."""
    return [
        DeclareLaunchArgument(name, default_value=default, description=text, choices=choices)
        for name, (default, text, choices) in arguments.items()
    ]


def transport(share: Path) -> dict[str, EnvironmentVariable]:
    """Environment of one of our nodes: the transport profile of this package, unless the user has another one. The
    other nodes of a launch keep theirs.

    :param share: folder of the installed package.
    """
    return {_PROFILES: EnvironmentVariable(_PROFILES, default_value=str(share / "config" / "fastdds.xml"))}


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
