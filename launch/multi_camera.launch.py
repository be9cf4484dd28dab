# SPDX-License-Identifier: Apache-2.0
"""Several cameras through one flow node, which holds the model once and one stream for each camera.

ros2 launch deq_flow_ros multi_camera.launch.py cameras:=front,rear [image:=/front/image_raw,/rear/image_raw]
    [any argument of flow.launch.py]
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

FLOW = Path(get_package_share_directory("deq_flow_ros")) / "launch" / "flow.launch.py"


def _flow(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    cameras = LaunchConfiguration("cameras").perform(context).strip("[] ")
    image = LaunchConfiguration("image").perform(context)
    image = image or ",".join(f"{camera.strip()}/image_raw" for camera in cameras.split(","))
    arguments = {"cameras": cameras, "image": image}.items()
    return [IncludeLaunchDescription(PythonLaunchDescriptionSource(str(FLOW)), launch_arguments=arguments)]


def generate_launch_description() -> LaunchDescription:
    """Topics named after the cameras, unless given; the rest is flow.launch.py."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("cameras", default_value="front,rear", description="names, separated by commas"),
            DeclareLaunchArgument(
                "image", default_value="", description="their image topics, likewise; empty = NAME/image_raw for each"
            ),
            OpaqueFunction(function=_flow),
        ]
    )
