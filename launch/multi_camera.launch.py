# SPDX-License-Identifier: Apache-2.0
"""Several cameras through one flow node, which holds the model once and one stream for each camera.

ros2 launch deq_flow_ros multi_camera.launch.py cameras:=front,rear [image:=/front/image_raw,/rear/image_raw]
    [any argument of flow.launch.py]
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource

from deq_flow_ros.ros.launch_arguments import refuse_unknown
from launch import LaunchDescription

FLOW = Path(get_package_share_directory("deq_flow_ros")) / "launch" / "flow.launch.py"


def generate_launch_description() -> LaunchDescription:
    """flow.launch.py, which names the image topics after the cameras."""
    return LaunchDescription(
        [
            OpaqueFunction(function=refuse_unknown, args=[__file__]),
            DeclareLaunchArgument("cameras", default_value="front,rear", description="names, separated by commas"),
            IncludeLaunchDescription(PythonLaunchDescriptionSource(str(FLOW))),
        ]
    )
