# SPDX-License-Identifier: Apache-2.0
"""Quality of service in words and over DDS, and an rclpy that lacks what Humble's lacks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import CAMERA_TOPIC, NodeClient, running_node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.topic_endpoint_info import TopicEndpointInfo

from deq_flow_ros.host import Children
from deq_flow_ros.ros.qos import mismatch, silence, words_of

IMAGE = "sensor_msgs/msg/Image"
BEST_EFFORT, RELIABLE = ReliabilityPolicy.BEST_EFFORT, ReliabilityPolicy.RELIABLE
VOLATILE, TRANSIENT_LOCAL = DurabilityPolicy.VOLATILE, DurabilityPolicy.TRANSIENT_LOCAL
TOPIC = "/camera/image"


def qos(reliability: ReliabilityPolicy, durability: DurabilityPolicy = VOLATILE) -> QoSProfile:
    return QoSProfile(depth=5, reliability=reliability, durability=durability)


def publisher(profile: QoSProfile, name: str = "driver", topic_type: str = IMAGE) -> TopicEndpointInfo:
    return TopicEndpointInfo(node_name=name, node_namespace="/robot", topic_type=topic_type, qos_profile=profile)


@pytest.mark.parametrize("offered_durability", [VOLATILE, TRANSIENT_LOCAL])
@pytest.mark.parametrize("offered_reliability", [BEST_EFFORT, RELIABLE])
@pytest.mark.parametrize("wanted_durability", [VOLATILE, TRANSIENT_LOCAL])
@pytest.mark.parametrize("wanted_reliability", [BEST_EFFORT, RELIABLE])
def test_a_mismatch_names_topic_publisher_both_sides_and_the_cure(
    wanted_reliability: ReliabilityPolicy,
    wanted_durability: DurabilityPolicy,
    offered_reliability: ReliabilityPolicy,
    offered_durability: DurabilityPolicy,
) -> None:
    """ROS 2 itself delivers nothing in silence: this text is all that a user gets to see."""
    wanted, offered = qos(wanted_reliability, wanted_durability), qos(offered_reliability, offered_durability)
    unreliable = wanted_reliability == RELIABLE and offered_reliability == BEST_EFFORT
    forgetful = wanted_durability == TRANSIENT_LOCAL and offered_durability == VOLATILE
    text = mismatch(TOPIC, wanted, [publisher(offered)])
    assert (text is not None) == (unreliable or forgetful)
    if text is None:
        return
    words = f"wanted {wanted_reliability.name.lower()}, {wanted_durability.name.lower()}"
    assert f"nothing can arrive on {TOPIC}: {words}, but /robot/driver offers" in text
    assert f"offers {offered_reliability.name.lower()}, {offered_durability.name.lower()}" in text
    assert ("parameter qos_reliability" in text, "volatile in the node's qos_overrides" in text) == (
        unreliable,
        forgetful,
    )


def test_of_several_publishers_only_those_that_do_not_match_are_named() -> None:
    """A second camera driver that nobody can hear is a fault, though images come."""
    offers = [publisher(qos(RELIABLE), "good"), publisher(qos(BEST_EFFORT), "bad")]
    text = mismatch(TOPIC, qos(RELIABLE), offers)
    assert text is not None and "1 of 2 publishers cannot be received" in text
    assert "/robot/bad offers best_effort" in text and "/robot/good" not in text
    assert mismatch(TOPIC, qos(RELIABLE), []) is None


@pytest.mark.parametrize(
    ("offers", "words"),
    [
        ([], ["nobody publishes /camera/image", "remap", "ROS_DOMAIN_ID"]),
        (
            [publisher(qos(RELIABLE), "lidar", "sensor_msgs/msg/PointCloud2")],
            ["expected sensor_msgs/msg/Image on /camera/image", "/robot/lidar publishes sensor_msgs/msg/PointCloud2"],
        ),
        ([publisher(qos(BEST_EFFORT))], ["nothing can arrive", "offers best_effort, volatile", "qos_reliability"]),
        ([publisher(qos(RELIABLE))], ["/robot/driver publishes", "ros2 topic hz /camera/image", "config/fastdds.xml"]),
        ([TopicEndpointInfo(topic_type=IMAGE, qos_profile=qos(RELIABLE))], ["a publisher of unknown node publishes"]),
    ],
    ids=["no publisher", "wrong type", "mismatch", "nothing comes", "bare DDS"],
)
def test_silence_has_a_reason_and_a_next_step(offers: list[TopicEndpointInfo], words: list[str]) -> None:
    """ "Waiting for images" helps nobody: each cause has another cure."""
    text = silence(TOPIC, IMAGE, offers, 12.3, qos(RELIABLE))
    assert text.startswith("no image for 12 s") and all(word in text for word in words)


LIKE_HUMBLE = """
import sys, types
import rclpy.event_handler, rclpy.executors, rclpy.lifecycle, rclpy.node
sys.modules["rclpy.qos_event"] = sys.modules["rclpy.event_handler"]
sys.modules["rclpy.event_handler"] = None  # so that importing it fails
del rclpy.node.Node.add_pre_set_parameters_callback, rclpy.node.Node.add_post_set_parameters_callback
# That of Humble tells callbacks the message alone.
sys.modules["rclpy.subscription"] = types.SimpleNamespace(Subscription=type("Subscription", (), {}))
"""


def test_the_node_runs_with_what_humble_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: what later distributions have slips in unnoticed, as developers do not have Humble."""
    (tmp_path / "sitecustomize.py").write_text(LIKE_HUMBLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with running_node(tmp_path, f"~/image:={CAMERA_TOPIC}") as (node, _):
        node.connect()
        node.send(node.image(), node.image())
        node.until(lambda: node.flow, "a field")
        assert node.set_parameters(max_iterations=1) == ""
        node.forget()
        node.send(node.image())
        assert node.accounts[-1]["iterations"] == "1"


PROFILES = {
    f"{reliability.name}_{durability.name}".lower(): QoSProfile(depth=5, reliability=reliability, durability=durability)
    for reliability, durability in itertools.product((BEST_EFFORT, RELIABLE), (VOLATILE, TRANSIENT_LOCAL))
}
"""By the name of the node's camera whose subscription asks for it."""

Running = tuple[dict[str, NodeClient], Children]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The clients of the node's cameras by their names, and the node's process."""
    parameters = {"cameras": f"[{', '.join(PROFILES)}]", "silence_warning_s": 1.0}
    for name, profile in PROFILES.items():
        start = f"qos_overrides./{name}/image.subscription"
        parameters[f"{start}.reliability"] = profile.reliability.name.lower()
        parameters[f"{start}.durability"] = profile.durability.name.lower()
    rules = [f"~/{name}/image:=/{name}/image" for name in PROFILES]
    with running_node(tmp_path_factory.mktemp("node"), *rules, **parameters) as (first, children):
        clients = {name: NodeClient(name, beside=first) for name in PROFILES}
        yield clients, children
        for client in clients.values():
            client.destroy_node()


@pytest.mark.parametrize("offered", PROFILES)
def test_what_matches_delivers_and_what_cannot_is_named(running: Running, offered: str) -> None:
    """A subscription that receives nothing and does not say why is what users of ROS 2 complain about most."""
    clients, children = running
    offer = PROFILES[offered]
    for client in clients.values():
        client.replace_camera(offer)
    for name, client in clients.items():
        wanted = PROFILES[name]
        unreliable = (wanted.reliability, offer.reliability) == (RELIABLE, BEST_EFFORT)
        forgetful = (wanted.durability, offer.durability) == (TRANSIENT_LOCAL, VOLATILE)
        line = f"nothing can arrive on /{name}/image: wanted {words_of(wanted)}, but /client_{name} offers "
        line += words_of(offer)
        log = children.log("flow_node")
        if unreliable or forgetful:
            client.until(lambda line=line, log=log: line in log.read_text(), line)
            assert not client.messages and client.camera.get_subscription_count() == 0
        else:
            client.connect()
            accounts = client.send(client.image(), client.image(shift=1))
            assert accounts[-1]["outcome"] == "processed" and line not in log.read_text()
        client.forget()
