# SPDX-License-Identifier: Apache-2.0
"""Malformed images over DDS: thousands of them, each counted, and the node still works."""

import struct
import time
from collections.abc import Iterator
from random import Random

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from node_client import TIMEOUT_S, NodeClient, running_node
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import Image
from soak_parts import STAMP_OFFSET

from deq_flow_ros.host import Children

IMAGES = 4_000
IN_FLIGHT = 60
"""Images that may wait for their accounts: fewer than the middleware keeps, so that none is lost there."""
ENCODINGS = ["rgb8", "bgr8", "bgra8", "mono8", "mono16", "rgb16", "bayer_rggb8", "bayer_gbrg16", "yuv422_yuy2", "nv12"]
ENCODINGS += ["nv24", "32FC1", "8UC3", "", "jpeg", "RGB8", "rgb8 ", "x" * 300, "rgb8\n", "\u65e5", "'; drop", "%s"]
SIDES = [0, 1, 2, 15, 16, 17, 20, 33, 2**16, 2**31, 2**32 - 1]
ONE_BY_ONE = 200
"""Images at the end that each wait for the account of the one before: the worker sees every one of them."""
STEPS = [0, 1, 16, 48, 60, 96, 2**31, 2**32 - 1]
SIZES = [0, 1, 255, 256, 512, 768, 960, 1200, 1536]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeClient, Children]]:
    """A node with the cameras `fuzzed` and `good`, that all tests of this file share, and its process.

    The client hears nothing of `fuzzed`: to decode every account would take longer than all else.
    """
    parameters = {"cameras": "[fuzzed, good]", "max_iterations": 1, "qos_depth": 1000}
    rules = [f"~/{name}/image:=/{name}/image" for name in ("fuzzed", "good")]
    with running_node(tmp_path_factory.mktemp("node"), *rules, **parameters) as running:
        yield running


def malformed(random: Random, number: int) -> Image:
    """An image whose fields have nothing to do with each other; a few may be valid by accident."""
    message = Image(
        height=random.choice(SIDES),
        width=random.choice(SIDES),
        step=random.choice(STEPS),
        encoding=random.choice(ENCODINGS),
        is_bigendian=random.choice([0, 1, 255]),
    )
    message.data.frombytes(random.randbytes(random.choice(SIZES)))
    message.header.frame_id = random.choice(["", "camera", "\u00e9" * 50, "a/b"])
    # Each stamp stands once; seconds before 1970 and nanoseconds beyond a second are malformed as well.
    message.header.stamp = Time(sec=number - IMAGES // 3, nanosec=random.randrange(2**32))
    return message


def stamp_of(data: bytes) -> bytes:
    """The stamp in a serialized message that begins with a header."""
    return data[STAMP_OFFSET : STAMP_OFFSET + 8]


class Fuzzer(Node):
    """A camera that hears the accounts of its images, undecoded.

    It has no services, as each of those of a usual node takes time in every spin.
    """

    def __init__(self, children: Children) -> None:
        super().__init__("fuzzer", start_parameter_services=False, enable_rosout=False)
        self._children = children
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        qos = QoSProfile(depth=1000)
        self.camera: Publisher = self.create_publisher(Image, "/fuzzed/image", qos)
        self.accounts: list[bytes] = []
        self._probe = b""
        self.create_subscription(DiagnosticArray, "/flow_node/fuzzed/statistics", self._on_account, qos, raw=True)

    def _on_account(self, data: bytes) -> None:
        if stamp_of(data) != self._probe:
            self.accounts.append(data)

    def wait(self, count: int, period_s: float = TIMEOUT_S) -> bool:
        """Whether there are so many accounts within `period_s`; the node must not end meanwhile."""
        give_up = time.monotonic() + period_s
        while len(self.accounts) < count and time.monotonic() < give_up:
            self._executor.spin_once(timeout_sec=0.1)
            self._children.check()
        return len(self.accounts) >= count

    def connect(self, probe: Image) -> None:
        """Until images reach the node and accounts come back."""
        self.camera.publish(probe)
        while not self.wait(1, 0.2):
            self.camera.publish(probe)
        # Those of the last probes may still be under way, and are known by the stamp.
        self._probe = stamp_of(serialize_message(probe))
        self.accounts.clear()


def counters(account: bytes) -> dict[str, int]:
    """What an account says of all frames until then, by outcome."""
    pairs = deserialize_message(account, DiagnosticArray).status[0].values
    return {pair.key.removeprefix("frames_"): int(pair.value) for pair in pairs if pair.key.startswith("frames_")}


def check_that_it_works(client: NodeClient) -> None:
    """Good images give flow."""
    user = NodeClient("fuzzed", beside=client)
    user.next_stamp_ns = 10**18  # a stream of its own
    user.connect()
    outcomes = [account["outcome"] for account in user.send(*(user.image(shift=number) for number in range(3)))]
    user.destroy_node()
    assert outcomes == ["first", "processed", "processed"]


def test_each_of_thousands_of_malformed_images_has_its_account(running: tuple[NodeClient, Children]) -> None:
    """Drivers, bridges and cables do this; one image that ends the node ends the robot's eyes."""
    client, children = running
    random = Random(0)
    fuzzer = Fuzzer(children)
    fuzzer.connect(client.image())
    sent = []
    for number in range(IMAGES):
        message = malformed(random, number)
        sent.append(struct.pack("<iI", message.header.stamp.sec, message.header.stamp.nanosec))
        fuzzer.camera.publish(message)
        assert fuzzer.wait(len(sent) - (IN_FLIGHT if number < IMAGES - ONE_BY_ONE else 0))
    assert fuzzer.wait(IMAGES) and not fuzzer.wait(IMAGES + 1, 0.2)
    accounts = fuzzer.accounts
    fuzzer.destroy_node()
    assert sorted(map(stamp_of, accounts)) == sorted(sent)
    # Two threads publish accounts: the one that was counted last need not be the last to come.
    last = max((counters(data) for data in accounts[-10:]), key=lambda counters: sum(counters.values()))
    assert last["processed"] + last["first"] + last["dropped"] == last["received"] and last["lost"] == 0
    reasons = {data.split(b"dropped: ")[1][:24] for data in accounts[-ONE_BY_ONE:] if b"dropped: " in data}
    assert len(reasons) >= 8 and not any(b"superseded" in reason for reason in reasons)
    check_that_it_works(client)


def test_bytes_that_are_no_image_do_not_end_the_node(running: tuple[NodeClient, Children]) -> None:
    """A sender with another idea of the message: such bytes cannot even be told from each other, but must not hurt."""
    client, children = running
    fuzzer = Fuzzer(children)
    fuzzer.connect(client.image())
    whole = serialize_message(client.image())
    length_of_frame_id = STAMP_OFFSET + 8
    invalid_text = bytearray(whole)
    invalid_text[length_of_frame_id + 4] = 0xFF  # no UTF-8
    endless_text = bytearray(whole)
    struct.pack_into("<I", endless_text, length_of_frame_id, 2**32 - 1)
    for data in (whole[:6], whole[:20], whole[:60], whole[:-5], bytes(invalid_text), bytes(endless_text), bytes(400)):
        for _ in range(3):
            fuzzer.camera.publish(data)
            fuzzer.wait(10**6, 0.05)
    fuzzer.destroy_node()
    check_that_it_works(client)


def test_a_camera_gone_mad_does_not_disturb_its_neighbour(running: tuple[NodeClient, Children]) -> None:
    """One process for several cameras is only worth having if they do not share their faults."""
    client, children = running
    random = Random(1)
    good = NodeClient("good", beside=client)
    good.connect()
    good.send(good.image(), good.image())
    fuzzer = Fuzzer(children)
    fuzzer.connect(client.image())
    accounts = []
    for number in range(10):
        for _ in range(20):
            fuzzer.camera.publish(malformed(random, 20 * number))
        accounts += good.send(good.image(shift=number))
    assert fuzzer.wait(200)
    fuzzer.destroy_node()
    good.destroy_node()
    assert {account["outcome"] for account in accounts} == {"processed"}
    assert {(account["warm"], account["reset_reason"], account["frames_dropped"]) for account in accounts} == {
        ("true", "", accounts[0]["frames_dropped"])
    }
