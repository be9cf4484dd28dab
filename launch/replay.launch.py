# SPDX-License-Identifier: Apache-2.0
"""A recording through the flow node: the player and the node, which ends when the recording does.

ros2 launch deq_flow_ros replay.launch.py input:=recording [rate:=0.5] [loop:=true] [any argument of flow.launch.py]
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, EmitEvent, IncludeLaunchDescription, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription

ARGUMENTS = {
    "input": (None, "bag, video file, folder of images, or camera index"),
    "topic": ("", "image topic of a bag; empty = the first"),
    "rate": ("1.0", "speed, 1 = as recorded"),
    "loop": ("false", "start over at the end"),
    "image": ("image", "topic between player and node"),
    "namespace": ("", "namespace of both nodes"),
}


def generate_launch_description() -> LaunchDescription:
    """The node as flow.launch.py starts it, and the player, which waits for the node."""
    flow_launch = Path(get_package_share_directory("deq_flow_ros")) / "launch" / "flow.launch.py"
    types = {"input": str, "topic": str, "rate": float, "loop": bool}
    player = Node(
        package="deq_flow_ros",
        executable="player",
        name="player",
        namespace=LaunchConfiguration("namespace"),
        parameters=[
            {name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in types.items()}
            | {"wait_for_subscribers": 1, "wait_timeout_s": 120.0}
        ],
        remappings=[("~/image", LaunchConfiguration("image"))],
        output="screen",
        emulate_tty=True,
    )
    # The flow of the last frames is under way when the player ends; SIGINT lets the node finish it.
    end = EmitEvent(event=Shutdown(reason="the recording has been played"))
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(name, default_value=d, description=text) for name, (d, text) in ARGUMENTS.items()),
            IncludeLaunchDescription(PythonLaunchDescriptionSource(str(flow_launch))),
            player,
            RegisterEventHandler(OnProcessExit(target_action=player, on_exit=[end])),
        ]
    )
