# SPDX-License-Identifier: Apache-2.0
"""Parts of `flow_node` that another middleware, or a middleware that fails, reaches: within this process."""

import queue
from collections.abc import Iterator

import cv2
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
import torch
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import Image

from deq_flow_ros.ros.camera_input import MAX_WAIT_NS, arrival
from deq_flow_ros.ros.camera_stream import ReceivedFrame
from deq_flow_ros.ros.flow_node import FlowNode

MS = 1_000_000
WALL_NS, NOW_NS = 1_700_000_000_000_000_000, 5_000_000_000


@pytest.fixture
def node() -> Iterator[FlowNode]:
    """An active node with three threads; what it sets for the whole process is put back."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    parameters = ("threads:=3", "warm_up_width:=0", "warm_up_height:=0", "latency_budget_ms:=0.0", "max_iterations:=1")
    rclpy.init(args=["--ros-args", *(word for value in parameters for word in ("-p", value))])
    node = FlowNode()
    node.trigger_configure()
    node.trigger_activate()
    yield node
    node.close()
    node.destroy_node()
    rclpy.shutdown()
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


@pytest.mark.parametrize(
    ("received_ns", "waited_ns"),
    [
        (WALL_NS - 7 * MS, 7 * MS),
        (WALL_NS, 0),
        (WALL_NS - MAX_WAIT_NS, MAX_WAIT_NS),
        (0, 0),
        (-1, 0),
        (WALL_NS + 1, 0),
        (WALL_NS - MAX_WAIT_NS - 1, 0),
    ],
    ids=["waited", "at once", "longest", "no time given", "invalid", "clock set back", "clock set forward"],
)
def test_only_a_wait_that_can_be_counts_against_the_budget(received_ns: int, waited_ns: int) -> None:
    """Cyclone DDS gives no time of reception: taken for a wait of a second, every deadline would be past."""
    assert arrival(received_ns, WALL_NS, NOW_NS) == NOW_NS - waited_ns


def test_an_account_that_cannot_be_published_ends_no_thread(node: FlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker thread is not started again: one failure of the middleware would stop the flow for good."""
    camera = node._cameras[0]
    assert node._worker is not None
    accounts: queue.Queue[DiagnosticArray] = queue.Queue()

    def publish(account: DiagnosticArray) -> None:
        accounts.put(account)
        if "dropped" in account.status[0].message:
            raise RuntimeError("the middleware failed")

    monkeypatch.setattr(camera._statistics, "publish", publish)
    camera.drop(ReceivedFrame(camera, Image(), NOW_NS, None), "superseded by a newer frame")  # in the executor's thread
    messages = [accounts.get(timeout=10.0).status[0].message]
    good = Image(height=32, width=32, step=96, encoding="rgb8", data=bytes(32 * 96))
    for image in (Image(), good):  # the worker drops the first as empty
        node._worker.submit("", ReceivedFrame(camera, image, NOW_NS, None))
        messages.append(accounts.get(timeout=10.0).status[0].message)
    assert [message.split(":")[0] for message in messages] == ["dropped", "dropped", "stream starts"]


def test_threads_bind_torch_and_opencv(node: FlowNode) -> None:
    """OpenCV would take all cores beside torch, the one left to the middleware included."""
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (3, 3)
