# SPDX-License-Identifier: Apache-2.0
"""A recording through the flow node: the player and the node, which ends when the recording does.

ros2 launch deq_flow_ros replay.launch.py input:=recording [rate:=0.5] [loop:=true] [any argument of flow.launch.py]
"""

from launch.actions import OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.parameter_descriptions import ParameterValue

from deq_flow_ros.recordings import MediaError, open_source
from deq_flow_ros.ros.launching import BOOLEAN, Arguments, described, flow_launch, our_node
from launch import LaunchContext, LaunchDescription

ARGUMENTS: Arguments = {
    "input": (None, "bag, video file, folder of images, or camera index"),
    "topic": ("", "image topic of a bag; empty = the only one that there is"),
    "rate": ("1.0", "speed, 1 = as recorded"),
    "loop": ("false", "start over at the end", BOOLEAN),
    "compressed": ("", "publish the images compressed: jpeg or png; empty = raw", ["", "jpeg", "png"]),
    "image": ("image", "topic between player and node"),
    "namespace": ("", "namespace of both nodes"),
}


def _check(context: LaunchContext) -> None:
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


def generate_launch_description() -> LaunchDescription:
    """The node as flow.launch.py starts it, and the player, which waits for the node."""
    types = {"input": str, "topic": str, "rate": float, "loop": bool, "compressed": str}
    given = {name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in types.items()}
    player = our_node(
        "player", namespace=LaunchConfiguration("namespace"), remappings=[("~/image", LaunchConfiguration("image"))],
        parameters=[{**given, "wait_for_subscribers": 1, "wait_timeout_s": 120.0}],
    )  # fmt: skip
    flow = flow_launch(exit_on_failure="true")
    return described(__file__, ARGUMENTS, OpaqueFunction(function=_check), flow, player, always_ends=True)
