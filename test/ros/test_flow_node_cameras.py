# SPDX-License-Identifier: Apache-2.0
"""Several cameras in one `flow_node`, and the transports of their images: none of them disturbs another."""

from collections.abc import Iterator

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import PERIOD_NS, NodeClient, running_node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image

from deq_flow_ros.host import Children
from deq_flow_ros.imaging.encodings import encode_image

COUNTERS = ("received", "processed", "first", "dropped", "lost")
SIZES = {"front": (48, 64), "rear": (80, 96)}


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[NodeClient, NodeClient, Children]]:
    remappings = [f"~/{name}/image:=/{name}/image" for name in SIZES]
    with running_node(tmp_path_factory.mktemp("node"), *remappings, cameras="[front,rear]") as (client, children):
        front, rear = (NodeClient(name, beside=client) for name in SIZES)
        front.connect()
        rear.connect()
        yield front, rear, children
        front.destroy_node()
        rear.destroy_node()


@pytest.fixture
def front(running: tuple[NodeClient, NodeClient, Children]) -> NodeClient:
    """The camera that must not be disturbed, within a stream."""
    return within_stream(running[0], SIZES["front"])


@pytest.fixture
def rear(running: tuple[NodeClient, NodeClient, Children]) -> NodeClient:
    """The one that disturbs."""
    return within_stream(running[1], SIZES["rear"])


def within_stream(client: NodeClient, size: tuple[int, int]) -> NodeClient:
    client.spin_for(0.1)
    client.forget()
    client.send(client.image(size), client.image(size))
    client.until(lambda: client.flow, "a flow field")
    client.spin_for(0.1)
    client.forget()
    return client


def check_undisturbed(camera: NodeClient, accounts: list[dict[str, str]]) -> None:
    """Each frame was processed with the one before it. (Whether warm is not asked: the weights are untrained.)"""
    assert accounts and {account["outcome"] for account in accounts} == {"processed"}, accounts
    periods = {int(account["image2_stamp_ns"]) - int(account["image1_stamp_ns"]) for account in accounts}
    assert periods == {PERIOD_NS}, accounts


def test_each_camera_has_its_own_stream_outputs_and_accounts(front: NodeClient, rear: NodeClient) -> None:
    """Flow between the images of two cameras would be nonsense; so would one camera's flow under the other's name."""
    for number in range(3):
        images = {}
        for client, name in ((front, "front"), (rear, "rear")):
            images[name] = client.image(SIZES[name], shift=number)
            client.camera.publish(images[name])
        front.until(lambda n=number: min(len(front.messages), len(rear.messages)) > n, "an account of each")
    for client, name in ((front, "front"), (rear, "rear")):
        check_undisturbed(client, client.accounts)
        assert {account["camera"] for account in client.accounts} == {name}
        client.until(lambda c=client: len(c.flow) == 3, "three flow fields")
        assert {(flow.height, flow.width) for flow in client.flow} == {SIZES[name]}
        assert client.messages[-1].header == images[name].header


def test_a_camera_that_floods_takes_no_turn_of_the_other(front: NodeClient, rear: NodeClient) -> None:
    """A driver gone wild at 200 Hz must cost itself images, not the camera that the robot steers by."""
    before = rear.send(rear.image(SIZES["rear"]))[0]
    rear.forget()
    sent = []

    def send() -> None:
        rear.camera.publish(rear.image(SIZES["rear"], shift=len(sent)))
        sent.append(rear.next_stamp_ns - PERIOD_NS)

    def flood() -> None:
        for _ in range(4):  # at once: these small images are processed nearly as fast as this process can send
            send()

    timer = rear.create_timer(0.02, flood)
    rear.until(lambda: len(sent) > 20, "the flood")
    check_undisturbed(front, front.send(*(front.image(SIZES["front"], shift=number) for number in range(8))))
    rear.destroy_timer(timer)
    send()  # what got lost after the last image that arrived shows only when another one arrives
    rear.until(lambda: str(sent[-1]) in [account["image2_stamp_ns"] for account in rear.accounts], "the last account")
    rear.spin_for(0.2)
    stamps = [int(account["image2_stamp_ns"]) for account in rear.accounts]
    assert len(set(stamps)) == len(stamps) and set(stamps) <= set(sent)  # each at most one
    newest = max(rear.accounts, key=lambda account: sum(int(account[f"frames_{name}"]) for name in COUNTERS))
    counted = {name: int(newest[f"frames_{name}"]) - int(before[f"frames_{name}"]) for name in COUNTERS}
    assert counted["received"] == len(stamps) and counted["received"] + counted["lost"] == len(sent), counted
    reasons = {account["reason"] for account in rear.accounts if account["outcome"] == "dropped"}
    assert reasons == {"superseded by a newer frame"} and counted["processed"] >= 3


def test_a_camera_that_misbehaves_resets_itself_alone(front: NodeClient, rear: NodeClient) -> None:
    """A size that changes, a clock that loops, messages that are broken, silence."""
    broken = rear.image(SIZES["rear"])
    broken.step = 1
    other_size = rear.image((32, 32))
    rear.next_stamp_ns -= 20 * PERIOD_NS
    looped = [rear.image((32, 32)) for _ in range(3)]
    rear.next_stamp_ns += 30 * PERIOD_NS
    words = ["at least 288, got 1", "size changed from 96x80 to 32x32", "left out", "time went back by", ""]
    for image, expected in zip([broken, other_size, *looped], words, strict=True):
        account = rear.send(image)[0]
        assert expected in account["reason"]
        outcomes = {"": "processed", "left out": "dropped", "at least 288, got 1": "dropped"}
        assert account["outcome"] == outcomes.get(expected, "first")
        check_undisturbed(front, front.send(front.image(SIZES["front"])))
    check_undisturbed(front, front.send(*(front.image(SIZES["front"]) for _ in range(3))))  # the other one is silent


def compressed(client: NodeClient, shift: int, format: str = "png") -> CompressedImage:
    image = client.image(SIZES["front"], shift=shift)
    pixels = np.frombuffer(image.data, np.uint8).reshape(*SIZES["front"], 3)[..., ::-1]
    message = CompressedImage(header=image.header, format=f"rgb8; {format} compressed bgr8")
    message.data.frombytes(encode_image(np.ascontiguousarray(pixels), format, 90).tobytes())
    return message


def test_the_transport_follows_what_the_camera_publishes(front: NodeClient, rear: NodeClient) -> None:
    """Many cameras give compressed images only, and a node that waits for raw ones seems to be broken."""

    def switch(kind: type, topic: str) -> None:
        front.destroy_publisher(front.camera)
        front.camera = front.create_publisher(kind, topic, QoSProfile(depth=100))
        front.until(lambda: front.camera.get_subscription_count() == 1, f"the node to subscribe to {topic}")
        front.until(lambda: not front.count_subscribers(other[topic]), "the node to leave the other topic")

    other = {"/front/image/compressed": "/front/image", "/front/image": "/front/image/compressed"}
    for kind, topic in (
        (CompressedImage, "/front/image/compressed"),
        (CompressedImage, "/front/image"),
        (Image, "/front/image"),
    ):
        switch(kind, topic)
        make = front.image if kind is Image else lambda _, shift: compressed(front, shift)
        for number in range(50):  # each side learns of the other by itself
            front.camera.publish(make(SIZES["front"], shift=number))
            front.spin_for(0.1)
            if front.messages:
                break
        front.spin_for(0.2)
        accounts = front.send(*(make(SIZES["front"], shift=number) for number in range(3)))
        check_undisturbed(front, accounts[-2:])
        check_undisturbed(rear, rear.send(rear.image(SIZES["rear"])))
        front.forget()
