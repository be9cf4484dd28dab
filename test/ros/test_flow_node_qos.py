# SPDX-License-Identifier: Apache-2.0
"""Quality of service over DDS: what matches is delivered, and what cannot match is named in the node's log.

One node has a camera for each quality of service that it may ask for; the test plays the camera drivers.
"""

import itertools
from collections.abc import Iterator

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import NodeClient, running_node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from deq_flow_ros.live.children import Children
from deq_flow_ros.ros.qos import words_of

BEST_EFFORT, RELIABLE = ReliabilityPolicy.BEST_EFFORT, ReliabilityPolicy.RELIABLE
VOLATILE, TRANSIENT_LOCAL = DurabilityPolicy.VOLATILE, DurabilityPolicy.TRANSIENT_LOCAL
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
