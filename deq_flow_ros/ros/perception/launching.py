# SPDX-License-Identifier: Apache-2.0
"""A launch file with the flow node and a node that uses its flow. Imported by launch files only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import IncludeLaunchDescription, OpaqueFunction
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from deq_flow_ros.ros.launch_arguments import BOOLEAN, Arguments, declared, refuse_unknown, transport
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

UPSTREAM = ("flow", "uncertainty", "statistics", "camera_info")
"""Topics of the flow node that these nodes subscribe to."""


def with_flow_node(
    file: str, executable: str, own_file: str, params_file: tuple[str, str], inputs: Mapping[str, tuple[str, str]]
) -> LaunchDescription:
    """The flow node, unless one runs already, and the other node in the same namespace.

    :param file: the ``__file__`` of the launch file.
    :param executable: the other node, which has the same name.
    :param own_file: name of the argument with the parameter file of the other node.
    :param params_file: parameter file of the flow node, and what is said of it.
    :param inputs: further topics of the other node, with default and description. Where the default is empty, a
        parameter of this name says whether the node subscribes to it.
    """
    share = Path(get_package_share_directory("deq_flow_ros"))
    arguments: Arguments = {
        "start_flow_node": ("true", "start flow_node as well, as flow.launch.py does", BOOLEAN),
        "namespace": ("", "namespace of both nodes", None),
        **{topic: (default, text, None) for topic, (default, text) in inputs.items()},
        "name": (
            "flow_node",
            "name of flow_node; of one camera of several: NAME/CAMERA, with start_flow_node:=false",
            None,
        ),
        "params_file": (*params_file, None),
        own_file: ("", f"parameters of {executable}; empty = the defaults", None),
        "use_sim_time": ("false", "take the time from /clock", BOOLEAN),
    }

    def check(context: LaunchContext) -> list[LaunchDescriptionEntity]:
        """Before any process has started: an error would end the launch, and leave it running."""
        name = LaunchConfiguration(own_file).perform(context)
        if name and not Path(name).expanduser().is_file():
            raise RuntimeError(f"{own_file}: expected the path of a file, got {name!r}")
        return []

    def node(context: LaunchContext) -> list[LaunchDescriptionEntity]:
        value = {name: LaunchConfiguration(name).perform(context) for name in arguments}
        path = Path(value[own_file]).expanduser()
        given = {topic: default for topic, (default, _) in inputs.items() if value[topic]}
        switches = dict.fromkeys((topic for topic, default in given.items() if not default), True)
        return [
            Node(
                package="deq_flow_ros",
                executable=executable,
                name=executable,
                namespace=value["namespace"],
                parameters=[
                    *([str(path)] if value[own_file] else []),
                    {"use_sim_time": value["use_sim_time"] == "true", **switches},
                ],
                remappings=[
                    *((f"flow_node/{topic}", f"{value['name']}/{topic}") for topic in UPSTREAM),
                    *((topic, value[topic]) for topic in given),
                ],
                additional_env=transport(share),
                output="screen",
                emulate_tty=True,
            )
        ]

    return LaunchDescription(
        [
            OpaqueFunction(function=refuse_unknown, args=[file]),
            *declared(arguments),
            OpaqueFunction(function=check),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(share / "launch" / "flow.launch.py")),
                condition=IfCondition(LaunchConfiguration("start_flow_node")),
            ),
            OpaqueFunction(function=node),
        ]
    )
