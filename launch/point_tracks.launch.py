# SPDX-License-Identifier: Apache-2.0
"""Points followed from image to image: the flow node, and the node that follows the points.

ros2 launch deq_flow_ros point_tracks.launch.py image:=/camera/image_raw [any argument of flow.launch.py]
ros2 launch deq_flow_ros point_tracks.launch.py start_flow_node:=false [name:=flow_node]   # with one that runs already
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

SHARE = Path(get_package_share_directory("deq_flow_ros"))
PROFILES = "FASTRTPS_DEFAULT_PROFILES_FILE"
BOOLEAN = ["true", "false"]
ARGUMENTS: dict[str, tuple[str, str, list[str] | None]] = {
    "start_flow_node": ("true", "start flow_node as well, as flow.launch.py does", BOOLEAN),
    "namespace": ("", "namespace of both nodes", None),
    "image": ("image", "image topic, raw, of both nodes", None),
    "name": (
        "flow_node",
        "name of flow_node; of one camera of several: NAME/CAMERA, with start_flow_node:=false",
        None,
    ),
    "params_file": ("tracks", "parameters of flow_node, with direction: forward; see flow.launch.py", None),
    "tracks_params_file": ("", "parameters of point_tracks; empty = the defaults", None),
    "use_sim_time": ("false", "take the time from /clock", BOOLEAN),
}


def _tracks(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    file = Path(value["tracks_params_file"]).expanduser()
    if value["tracks_params_file"] and not file.is_file():
        raise RuntimeError(f"tracks_params_file: expected the path of a file, got {value['tracks_params_file']!r}")
    parameters: dict[str, bool] = {"use_sim_time": value["use_sim_time"] == "true"}
    inputs = ("flow", "uncertainty", "statistics")
    remappings = [(f"flow_node/{topic}", f"{value['name']}/{topic}") for topic in inputs]
    remappings.append(("image", value["image"]))
    return [
        Node(
            package="deq_flow_ros",
            executable="point_tracks",
            name="point_tracks",
            namespace=value["namespace"],
            parameters=[*([str(file)] if value["tracks_params_file"] else []), parameters],
            remappings=remappings,
            additional_env={
                PROFILES: EnvironmentVariable(PROFILES, default_value=str(SHARE / "config" / "fastdds.xml"))
            },
            output="screen",
            emulate_tty=True,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Arguments, the flow node unless one runs already, and the node that follows the points."""
    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=default, description=text, choices=choices)
                for name, (default, text, choices) in ARGUMENTS.items()
            ),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(SHARE / "launch" / "flow.launch.py")),
                condition=IfCondition(LaunchConfiguration("start_flow_node")),
            ),
            OpaqueFunction(function=_tracks),
        ]
    )
