# SPDX-License-Identifier: Apache-2.0
"""The flow node on a robot: subscribes to a camera's images and publishes their flow.

ros2 launch deq_flow_ros flow.launch.py image:=/camera/image_raw [device:=cuda] [params_file:=my_flow.yaml] [...]
"""

import os
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

CONFIG = Path(get_package_share_directory("deq_flow_ros")) / "config"

ARGUMENTS = {
    "namespace": ("", "namespace of the node"),
    "name": ("flow_node", "name of the node; its outputs are NAME/flow, NAME/flow_color and so on"),
    "image": ("image", "topic of the images, sensor_msgs/Image; relative to the namespace without a leading slash"),
    "params_file": (str(CONFIG / "flow.yaml"), "parameters, laid out as in config/flow.yaml"),
    "model": ("", "model name or weights file, in place of the one in params_file"),
    "device": ("", "cpu, cuda or cuda:N, in place of the one in params_file"),
    "autostart": ("", "true or false, in place of the one in params_file"),
    "log_level": ("info", "debug, info, warn, error or fatal"),
}


def _node(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    overrides: dict[str, str | bool] = {name: value[name] for name in ("model", "device") if value[name]}
    if value["autostart"]:
        overrides["autostart"] = value["autostart"].lower() == "true"
    logger = ".".join([*value["namespace"].strip("/").split("/"), value["name"]]).lstrip(".")
    return [
        Node(
            package="deq_flow_ros",
            executable="flow_node",
            name=value["name"],
            namespace=value["namespace"],
            parameters=[value["params_file"], overrides],
            remappings=[("~/image", value["image"])],
            ros_arguments=["--log-level", f"{logger}:={value['log_level']}"],
            output="screen",
            emulate_tty=True,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Arguments, the transport profile (unless the user has one), and the node."""
    profile = os.environ.get("FASTRTPS_DEFAULT_PROFILES_FILE") or str(CONFIG / "fastdds.xml")
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(name, default_value=d, description=text) for name, (d, text) in ARGUMENTS.items()),
            SetEnvironmentVariable("FASTRTPS_DEFAULT_PROFILES_FILE", profile),
            OpaqueFunction(function=_node),
        ]
    )
