# SPDX-License-Identifier: Apache-2.0
"""Quality of service: what ROS's own overrides set of it, and why nothing arrives on a topic.

Also what ROS 2 Humble has under other names or not at all, in one place (docs/install.md lists it). ``offers`` are what
``Node.get_publishers_info_by_topic`` returns.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import rclpy.qos
from rclpy import get_rmw_implementation_identifier
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

DEPTH = 5
"""Messages kept, as in ROS's sensor data profile."""
UNKNOWN = {"received_timestamp": 0, "publication_sequence_number": 0}
"""What is told of a message where rclpy tells nothing: it counts as just arrived, and none as lost before it."""
OVERRIDABLE = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
"""What ROS's own ``qos_overrides`` parameters may set of the node's topics."""
SILENT = SubscriptionEventCallbacks(use_default_callbacks=False)
"""Of a subscription that rclpy is not to warn of; what does not match is told by ``mismatch``."""

SHARED_MEMORY, FULL_BYTES = Path("/dev/shm"), 64_000_000
"""Of Fast DDS; a process takes 32 MB of it with this package's profile."""

# By a word of rclpy's reasons ("Best effort publisher and reliable subscription", ...).
_REMEDIES = {
    "reliable subscription": "set the parameter qos_reliability to best_effort, or let the publisher be reliable",
    "transient local subscription": "ask for volatile in the node's qos_overrides, or let the publisher be so as well",
}


def sensor_data() -> QoSProfile:
    """The sensor data profile, one of its own: QoS overrides are written into the profile given."""
    return QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)


def latched() -> QoSProfile:
    """Of a message that was published once, perhaps before the subscription; for that it must be reliable."""
    reliable, durable = ReliabilityPolicy.RELIABLE, DurabilityPolicy.TRANSIENT_LOCAL
    return QoSProfile(depth=1, reliability=reliable, durability=durable)


def output() -> QoSProfile:
    """Of what the node publishes: reliable, so that subscribers of both kinds match.

    Of a subscriber that does not keep up, only the last few messages wait for it, and the publisher never does.
    """
    return QoSProfile(depth=DEPTH, reliability=ReliabilityPolicy.RELIABLE)


def given_overrides(node: Node) -> dict[str, Any]:
    """The parameters that were given to a node at start, known or not; rclpy offers no public way to ask."""
    return getattr(node, "_parameter_overrides", {})


def override_options(node: Node, topic: str) -> QoSOverridingOptions:
    """ROS's QoS overrides of a subscription, ``qos_overrides.TOPIC.subscription.POLICY``, as far as they are given.

    The others are not declared: such a parameter can never be changed again, and what it first was would stand in the
    way of ``qos_reliability`` and ``qos_depth`` in the next configure.
    """
    given, start = given_overrides(node), f"qos_overrides.{topic}.subscription."
    return QoSOverridingOptions([kind for kind in OVERRIDABLE if f"{start}{kind.name.lower()}" in given])


def unused_overrides(node: Node, inputs: Iterable[str]) -> list[str]:
    """A line for each ``qos_overrides`` parameter given at start that none of the node's topics takes.

    :param inputs: full names of the topics that the node may subscribe to; those of its publishers it knows itself.
    """
    policies = [kind.name.lower() for kind in OVERRIDABLE]
    taken = {f"qos_overrides.{topic}.subscription.{policy}" for topic in inputs for policy in policies}
    return [
        f"{name!r} changes nothing: expected qos_overrides.TOPIC.{{publisher,subscription}}.{{{','.join(policies)}}} "
        "with the full name of a topic of this node"
        for name in given_overrides(node)
        if name.startswith("qos_overrides.") and not node.has_parameter(name) and name not in taken
    ]


def mismatch(topic: str, wanted: QoSProfile, offers: Sequence[TopicEndpointInfo]) -> str | None:
    """What a subscription that asks for ``wanted`` cannot receive because of its quality; None if nothing."""
    offered, reasons = [], ""
    for offer in offers:
        compatibility, told = rclpy.qos.qos_check_compatible(offer.qos_profile, wanted)
        if compatibility == rclpy.qos.QoSCompatibility.ERROR:  # a warning, of policies left to the middleware, is none
            reason = ", ".join(re.findall(r"ERROR: ([^;]*)", told))
            offered.append(f"{_name(offer)} offers {words_of(offer.qos_profile)} ({reason})")
            reasons += reason
    if not offered:
        return None
    some = f"{len(offered)} of {len(offers)} publishers cannot be received"
    which = "nothing can arrive" if len(offered) == len(offers) else some
    remedies = [remedy for word, remedy in _REMEDIES.items() if word in reasons]
    return f"{which} on {topic}: wanted {words_of(wanted)}, but {'; '.join([*offered, *remedies])}"


def transport_advice() -> str:
    """What to do where images are lost between a camera and the node; of /dev/shm where it is full."""
    if "fastrtps" not in get_rmw_implementation_identifier():
        return "give the sockets more memory (docs/troubleshooting.md), or use compressed images"
    advice = "start the camera with this package's config/fastdds.xml, or over a network use compressed images"
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else FULL_BYTES
    if free < FULL_BYTES:
        advice = f"{SHARED_MEMORY} has {free / 1e6:.0f} MB left, so give it more room; {advice}"
    return advice


def silence(
    topic: str, expected_type: str, offers: Sequence[TopicEndpointInfo], seconds: float, wanted: QoSProfile
) -> str:
    """Why no message has come on ``topic`` for ``seconds``: no publisher, another type than ``expected_type``
    ("sensor_msgs/msg/Image"), a quality of service that does not match ``wanted``, or none of these.
    """
    start = f"no image for {seconds:.0f} s"
    if not offers:
        return (
            f"{start}: nobody publishes {topic}; start the camera, or remap the node's input to the topic that it "
            "publishes (`ros2 topic list -t` shows them; none at all means another ROS_DOMAIN_ID or network)"
        )
    fitting = [offer for offer in offers if offer.topic_type == expected_type]
    if not fitting:
        types = ", ".join(f"{_name(offer)} publishes {offer.topic_type}" for offer in offers)
        return f"{start}: expected {expected_type} on {topic}, but {types}; remap the node's input to an image topic"
    if (reason := mismatch(topic, wanted, fitting)) is not None:
        return f"{start}: {reason}"
    names = ", ".join(_name(offer) for offer in fitting)
    return (
        f"{start}: {names} publishes {topic} but nothing arrives; either it sends nothing (`ros2 topic hz {topic}`), "
        f"or images are lost on the way: {transport_advice()}"
    )


def words_of(profile: QoSProfile) -> str:
    """A quality of service in words: "reliable, volatile"."""
    return f"{profile.reliability.name.lower()}, {profile.durability.name.lower()}"


def _name(offer: TopicEndpointInfo) -> str:
    """Full name of a publisher's node; a bare DDS application has none, a new publisher's is not known at once."""
    name = f"{offer.node_namespace.rstrip('/')}/{offer.node_name}"
    return "a publisher of unknown node" if name == "/" or "_NODE_NAME_UNKNOWN_" in name else name


def with_info(callback: Callable[[Any, dict[str, int]], None]) -> Callable[..., None]:
    """A callback for a subscription that takes a message and what the middleware knows of it; in Humble ``UNKNOWN``."""
    if hasattr(Subscription, "CallbackType"):
        return callback
    return lambda message: callback(message, UNKNOWN)
