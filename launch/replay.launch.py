# SPDX-License-Identifier: Apache-2.0
"""A recording through the flow node: the player and the node, which ends when the recording does.

ros2 launch deq_flow_ros replay.launch.py input:=recording [rate:=0.5] [loop:=true] [any argument of flow.launch.py]
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import (
    EmitEvent,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.events.process import ProcessExited
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from deq_flow_ros.recordings import MediaError, open_source
from deq_flow_ros.ros.launch_arguments import BOOLEAN, Arguments, declared, refuse_unknown, transport
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

SHARE = Path(get_package_share_directory("deq_flow_ros"))
ARGUMENTS: Arguments = {
    "input": (None, "bag, video file, folder of images, or camera index", None),
    "topic": ("", "image topic of a bag; empty = the only one that there is", None),
    "rate": ("1.0", "speed, 1 = as recorded", None),
    "loop": ("false", "start over at the end", BOOLEAN),
    "compressed": ("", "publish the images compressed: jpeg or png; empty = raw", ["", "jpeg", "png"]),
    "image": ("image", "topic between player and node", None),
    "namespace": ("", "namespace of both nodes", None),
}


def _check(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Refuse what the player would refuse, before any process has started and has to be ended again."""
    recording, topic, rate = (LaunchConfiguration(name).perform(context) for name in ("input", "topic", "rate"))
    try:
        if not 0.0 < float(rate) < float("inf"):
            raise ValueError
    except ValueError:
        raise RuntimeError(f"rate: expected a number above 0, such as 0.5, got {rate!r}") from None
    try:
        open_source(recording, topic=topic or None)
    except (MediaError, OSError) as error:
        raise RuntimeError(f"input: {error}") from None
    return []


def _end(event: ProcessExited, context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Player and node need each other, so the end of one is that of the launch; its failure is the launch's as well."""
    if event.returncode != 0 and not context.is_shutdown:
        raise RuntimeError(f"{event.process_name} ended with status {event.returncode}; it says why above")
    return [EmitEvent(event=Shutdown(reason=f"{event.process_name} has ended"))]


def _is_ours(action: ExecuteProcess) -> bool:
    return isinstance(action, Node) and action.node_package == "deq_flow_ros"


def generate_launch_description() -> LaunchDescription:
    """The node as flow.launch.py starts it, and the player, which waits for the node."""
    flow_launch = SHARE / "launch" / "flow.launch.py"
    types = {"input": str, "topic": str, "rate": float, "loop": bool, "compressed": str}
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
        additional_env=transport(SHARE),
        output="screen",
        emulate_tty=True,
    )
    return LaunchDescription(
        [
            OpaqueFunction(function=refuse_unknown, args=[__file__]),
            *declared(ARGUMENTS),
            OpaqueFunction(function=_check),
            # The flow of the last frames is under way when the player ends; SIGINT lets the node finish it. Viewers may
            # be closed.
            RegisterEventHandler(OnProcessExit(target_action=_is_ours, on_exit=_end)),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(flow_launch)), launch_arguments=[("exit_on_failure", "true")]
            ),
            player,
        ]
    )
