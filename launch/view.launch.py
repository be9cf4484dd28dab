# SPDX-License-Identifier: Apache-2.0
"""The flow node and its live pictures in a web page on this machine, http://127.0.0.1:8080 unless told otherwise.

ros2 launch deq_flow_ros view.launch.py image:=/camera/image_raw [port:=8081] [any argument of flow.launch.py]
ros2 launch deq_flow_ros view.launch.py node:=false [namespace:=...] [name:=...]     # of a node that runs already
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource

from deq_flow_ros.ros.launch_arguments import refuse_unknown
from launch import LaunchDescription

FLOW = Path(get_package_share_directory("deq_flow_ros")) / "launch" / "flow.launch.py"


def generate_launch_description() -> LaunchDescription:
    """flow.launch.py with the page."""
    return LaunchDescription(
        [
            OpaqueFunction(function=refuse_unknown, args=[__file__]),
            DeclareLaunchArgument("view", default_value="true", description="serve the page"),
            IncludeLaunchDescription(PythonLaunchDescriptionSource(str(FLOW))),
        ]
    )
