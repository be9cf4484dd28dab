# SPDX-License-Identifier: Apache-2.0
"""Why nothing arrives on a topic, from what the ROS graph says of its publishers. Pure functions.

`offers` are what `Node.get_publishers_info_by_topic` returns. Which qualities of service match is rclpy's knowledge
(`rclpy.qos.qos_check_compatible`), not ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
from rclpy.topic_endpoint_info import TopicEndpointInfo

# By a word of rclpy's reasons ("Best effort publisher and reliable subscription", ...).
_REMEDIES = {
    "reliable subscription": "set the parameter qos_reliability to best_effort, or let the publisher be reliable",
    "transient local subscription": "ask for volatile in the node's qos_overrides, or let the publisher be so as well",
    "deadline": "ask for a longer deadline, or for none, in the node's qos_overrides",
    "liveliness": "ask for less liveliness in the node's qos_overrides",
}


def qos_mismatch(topic: str, wanted: QoSProfile, offers: Sequence[TopicEndpointInfo]) -> str | None:
    """What a subscription that asks for `wanted` cannot receive because of its quality of service; None if nothing.

    The text names the topic, each publisher that does not match, what it offers, what was wanted, and what to change.
    """
    mismatches = [(offer, reason) for offer in offers if (reason := _incompatible(offer.qos_profile, wanted))]
    if not mismatches:
        return None
    if len(mismatches) == len(offers):
        which = "nothing can arrive"
    else:
        which = f"{len(mismatches)} of {len(offers)} publishers cannot be received"
    offered = "; ".join(
        f"{_name(offer)} offers {qos_words(offer.qos_profile)} ({reason})" for offer, reason in mismatches
    )
    reasons = " ".join(reason for _, reason in mismatches)
    remedies = [remedy for word, remedy in _REMEDIES.items() if word in reasons]
    return f"{which} on {topic}: wanted {qos_words(wanted)}, but {offered}; {'; '.join(remedies)}"


def silence(
    topic: str, expected_type: str, offers: Sequence[TopicEndpointInfo], seconds: float, wanted: QoSProfile
) -> str:
    """Why no message has come on `topic` for `seconds`: no publisher, another type than `expected_type`
    ("sensor_msgs/msg/Image"), a quality of service that does not match `wanted`, or none of these.
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
    mismatch = qos_mismatch(topic, wanted, fitting)
    if mismatch is not None:
        return f"{start}: {mismatch}"
    names = ", ".join(_name(offer) for offer in fitting)
    return (
        f"{start}: {names} publishes {topic} but nothing arrives; either it sends nothing (`ros2 topic hz {topic}`), "
        "or images are lost on the way: start the camera with this package's config/fastdds.xml, and see that /dev/shm "
        "and the network have room for them"
    )


def qos_words(profile: QoSProfile) -> str:
    """A quality of service in words: "reliable, volatile"."""
    return f"{profile.reliability.name.lower()}, {profile.durability.name.lower()}"


def _incompatible(offered: QoSProfile, wanted: QoSProfile) -> str:
    """Why the two do not match, empty if they do; a mere warning (policies left to the middleware) is a match."""
    compatibility, reason = qos_check_compatible(offered, wanted)
    if compatibility != QoSCompatibility.ERROR:
        return ""
    parts = (part.strip() for part in reason.split(";"))
    return ", ".join(part.removeprefix("ERROR: ") for part in parts if part.startswith("ERROR: "))


def _name(offer: TopicEndpointInfo) -> str:
    """Full name of a publisher's node; a bare DDS application has none, a new publisher's is not known at once."""
    name = f"{offer.node_namespace.rstrip('/')}/{offer.node_name}"
    return "a publisher of unknown node" if name == "/" or "_NODE_NAME_UNKNOWN_" in name else name
