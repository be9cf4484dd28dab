# SPDX-License-Identifier: Apache-2.0
"""What the launch files share. Imported by them only, as it needs ``launch``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument as Argument
from launch.actions import EmitEvent, ExecuteProcess, IncludeLaunchDescription, OpaqueFunction, RegisterEventHandler
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.events.process import ProcessExited
from launch.launch_description_sources import (
    PythonLaunchDescriptionSource,
    get_launch_description_from_python_launch_file,
)
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import Node

from deq_flow_ros import did_you_mean
from launch import Condition, LaunchContext, LaunchDescription, LaunchDescriptionEntity

BOOLEAN = ("true", "false")
Arguments: TypeAlias = Mapping[str, tuple[str | None, str] | tuple[str | None, str, Sequence[str]]]
"""Default, description and perhaps choices by name. Without a default, the argument must be given."""
UPSTREAM = ("flow", "uncertainty", "statistics", "camera_info")
"""Topics of the flow node that other nodes subscribe to."""
_PROFILES = "FASTRTPS_DEFAULT_PROFILES_FILE"


def share() -> Path:
    """Folder of the installed package."""
    return Path(get_package_share_directory("deq_flow_ros"))


def described(
    file: str, arguments: Arguments, *actions: LaunchDescriptionEntity, always_ends: bool = False
) -> LaunchDescription:
    """A launch file: its arguments, and what it starts.

    One that the command line names refuses arguments that it does not have, and ends with the first of our nodes that
    does, as ``ends_with_nodes`` says. One that another launch file includes leaves both to that one.

    :param always_ends: whether it ends with its nodes wherever it is included.
    """

    def first(context: LaunchContext) -> list[LaunchDescriptionEntity]:
        named = _is_named(Path(file))
        if named:
            _refuse_unknown(file)
        return [ends_with_nodes()] if named or always_ends else []

    declared = [
        Argument(name, default_value=row[0], description=row[1], choices=row[2] if len(row) == 3 else None)
        for name, row in arguments.items()
    ]
    return LaunchDescription([OpaqueFunction(function=first), *declared, *actions])


def _is_named(file: Path) -> bool:
    """Whether it is the launch file of the command line, by its path or of our package; others may have its name."""
    of_ours = "deq_flow_ros" in sys.argv
    words = [Path(word) for word in sys.argv if Path(word).name == file.name]
    return any(of_ours or word.resolve() == file.resolve() for word in words)


def _refuse_unknown(file: str) -> None:
    """Refuse an argument of the command line that a launch file does not have, which ``ros2 launch`` passes over."""
    known = [argument.name for argument in get_launch_description_from_python_launch_file(file).get_launch_arguments()]
    for word in sys.argv:
        name, assigned, _ = word.partition(":=")
        if assigned and name not in known:
            raise RuntimeError(f"no argument {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")


def ends_with_nodes() -> RegisterEventHandler:
    """End the launch with the first of our nodes that ends, as they need each other; its failure is the launch's.

    The others get SIGINT, and finish the flow that is under way. Viewers may be closed, and with ``respawn:=true`` the
    flow node comes back.
    """

    def is_needed(action: ExecuteProcess) -> bool:
        return isinstance(action, Node) and action.node_package == "deq_flow_ros"

    def end(event: ProcessExited, context: LaunchContext) -> list[LaunchDescriptionEntity]:
        respawns = context.launch_configurations.get("respawn") == "true"
        if respawns and event.action.node_executable == "flow_node":
            return []
        if event.returncode != 0 and not context.is_shutdown:
            raise RuntimeError(f"{event.process_name} ended with status {event.returncode}; it says why above")
        return [EmitEvent(event=Shutdown(reason=f"{event.process_name} has ended"))]

    return RegisterEventHandler(OnProcessExit(target_action=is_needed, on_exit=end))


def flow_launch(condition: Condition | None = None, **arguments: str) -> IncludeLaunchDescription:
    """``flow.launch.py``, with these arguments beside those of the launch file that includes it."""
    source = PythonLaunchDescriptionSource(str(share() / "launch" / "flow.launch.py"))
    return IncludeLaunchDescription(source, launch_arguments=arguments.items(), condition=condition)


def our_node(executable: str, **more: Any) -> Node:
    """One of our nodes, with the name of its program if ``more`` has no other, and the transport profile of this
    package, unless the user has another one; the other nodes of a launch keep theirs.
    """
    profile = EnvironmentVariable(_PROFILES, default_value=str(share() / "config" / "fastdds.xml"))
    usual = {"name": executable, "additional_env": {_PROFILES: profile}, "output": "screen", "emulate_tty": True}
    return Node(package="deq_flow_ros", executable=executable, **{**usual, **more})


def with_flow_node(file: str, executable: str, inputs: Mapping[str, tuple[str, str]]) -> LaunchDescription:
    """A launch file with the flow node, unless one runs already, and another node in the same namespace.

    :param executable: the other node, which has the same name, and parameters in a file that an argument names by the
        last word of it: ``mask_params_file`` for ``motion_mask``.
    :param inputs: further topics of the other node, with default and description. Where the default is empty, a
        parameter of this name says whether the node subscribes to it.
    """
    own_file = f"{executable.rpartition('_')[2]}_params_file"
    arguments: Arguments = {
        "start_flow_node": ("true", "start flow_node as well, as flow.launch.py does", BOOLEAN),
        "namespace": ("", "namespace of both nodes"),
        **inputs,
        "name": ("flow_node", "name of flow_node; of one camera of several: NAME/CAMERA, with start_flow_node:=false"),
        "params_file": ("perception", "parameters of flow_node; see flow.launch.py"),
        own_file: ("", f"parameters of {executable}; empty = the defaults"),
        "use_sim_time": ("false", "take the time from /clock", BOOLEAN),
    }

    def check(context: LaunchContext) -> None:
        """Before any process has started: an error would end the launch, and leave it running."""
        name = LaunchConfiguration(own_file).perform(context)
        if name and not Path(name).expanduser().is_file():
            raise RuntimeError(f"{own_file}: expected the path of a file, got {name!r}")

    def node(context: LaunchContext) -> list[LaunchDescriptionEntity]:
        value = {name: LaunchConfiguration(name).perform(context) for name in arguments}
        given = {topic: default for topic, (default, _) in inputs.items() if value[topic]}
        parameters: list[Any] = [str(Path(value[own_file]).expanduser())] if value[own_file] else []
        switches = {topic: True for topic, default in given.items() if not default}
        parameters.append({"use_sim_time": value["use_sim_time"] == "true", **switches})
        rules = [(f"flow_node/{topic}", f"{value['name']}/{topic}") for topic in UPSTREAM]
        rules += [(topic, value[topic]) for topic in given]
        return [our_node(executable, namespace=value["namespace"], parameters=parameters, remappings=rules)]

    flow = flow_launch(IfCondition(LaunchConfiguration("start_flow_node")))
    return described(file, arguments, OpaqueFunction(function=check), flow, OpaqueFunction(function=node))
