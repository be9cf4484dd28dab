# SPDX-License-Identifier: Apache-2.0
"""`flow_node` as a process of its own over DDS: every frame accounted for, and no input that brings it down."""

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from builtin_interfaces.msg import Time
from encoded_pictures import encode, padded, picture
from node_client import CAMERA_TOPIC, PERIOD_NS, NodeClient, node_arguments, running_node, untrained_weights
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image

from deq_flow_ros.host import ChildError, Children
from deq_flow_ros.imaging.encodings import ENCODINGS
from deq_flow_ros.ros.parameters import NodeSettings

COUNTERS = ("received", "processed", "first", "dropped", "lost")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeClient, Children]]:
    """One node that all tests of this file share: what one of them does must not hurt the next."""
    with running_node(tmp_path_factory.mktemp("node"), f"~/image:={CAMERA_TOPIC}") as running:
        running[0].connect()
        yield running


@pytest.fixture(scope="module")
def node(running: tuple[NodeClient, Children]) -> NodeClient:
    """A client of it."""
    return running[0]


@pytest.fixture(scope="module")
def children(running: tuple[NodeClient, Children]) -> Children:
    """Its process, and others for a test to start."""
    return running[1]


@pytest.fixture(autouse=True)
def nothing_collected(node: NodeClient) -> None:
    node.spin_for(0.1)
    node.forget()


def check_header_rule(node: NodeClient, sent: list[Image], direction: str) -> None:
    """Each output of each pair has the header of the image on whose pixels it lives, and its size."""
    expected = [image.header for image in (sent[:-1] if direction == "forward" else sent[1:])]
    count = len(expected)
    node.until(lambda: min(len(node.flow), len(node.color), len(node.residual)) >= count, f"{count} of each output")
    kinds = ((node.flow, "32FC2", 8), (node.color, "rgb8", 3), (node.residual, "32FC1", 4))
    for outputs, encoding, pixel_bytes in kinds:
        assert [output.header for output in outputs] == expected, encoding
        for output in outputs:
            assert (output.encoding, output.height, output.width) == (encoding, 48, 64)
            assert output.step == 64 * pixel_bytes and len(output.data) == 48 * output.step
    flow = np.frombuffer(node.flow[-1].data, np.float32)
    assert np.isfinite(flow).all() and np.ptp(flow) > 0.0


def test_outputs_follow_the_header_rule_and_each_frame_has_one_account(node: NodeClient) -> None:
    """Flow with the wrong stamp is matched with the wrong image, and nobody notices; so is an account."""
    images = [node.image(shift=number) for number in range(6)]
    accounts = node.send(*images)
    check_header_rule(node, images, "forward")
    assert [account["outcome"] for account in accounts] == ["first"] + ["processed"] * 5
    assert [message.header for message in node.messages] == [image.header for image in images]
    stamps = [str(image.header.stamp.sec * 10**9 + image.header.stamp.nanosec) for image in images]
    assert [account["image2_stamp_ns"] for account in accounts] == stamps
    assert [account["image1_stamp_ns"] for account in accounts] == ["", *stamps[:-1]]
    second, last = accounts[1], accounts[-1]
    assert (second["warm"], last["warm"]) == ("false", "true")
    assert last["iterations"] == "2" and last["stop_reason"] == "iterations" and last["direction"] == "forward"
    assert float(last["latency_ms"]) > float(last["stage_solve_ms"]) > 0.0 and last["budget_ms"] == ""
    documented = (Path(__file__).parents[2] / "docs" / "node.md").read_text()
    assert [key for key in last if f"`{key}`" not in documented and not key.startswith("stage_")] == []
    counts = {name: int(last[f"frames_{name}"]) for name in COUNTERS}
    assert counts["received"] == counts["processed"] + counts["first"] + counts["dropped"] and counts["lost"] == 0


def test_the_uncertainty_comes_while_somebody_subscribes(node: NodeClient) -> None:
    """It is computed for subscribers only, from the first image on after they are known, with the flow's header."""
    received: list[Image] = []
    sent = [node.image(shift=number) for number in range(2)]
    node.send(*sent)
    subscription = node.create_subscription(
        Image, "/flow_node/uncertainty", received.append, rclpy.qos.qos_profile_sensor_data
    )
    for number in range(2, 40):
        sent.append(node.image(shift=number))
        node.send(sent[-1])
        if received:
            break
    node.destroy_subscription(subscription)
    message = received[0]
    assert message.header in [image.header for image in sent]
    assert (message.encoding, message.height, message.width, message.step) == ("32FC1", 48, 64, 4 * 64)
    assert (np.frombuffer(message.data, np.float32) > 0).all()


def test_every_encoding_arrives_and_gives_the_flow_of_its_picture(node: NodeClient) -> None:
    """From the camera's bytes to the flow: one that the middleware or the node's own checks refuse would show here."""
    flows = {}
    for encoding in ("bgr8", *(name for name in ENCODINGS if name != "bgr8")):
        node.forget()
        messages = []
        for shift in (0, 2):
            message = node.image()
            samples = encode(np.roll(picture(), shift, axis=1), encoding)
            big = samples.itemsize == 2
            data, message.step = padded(samples.astype(">u2") if big else samples, encoding, padding=4)
            message.height, message.width = picture().shape[:2]
            message.encoding, message.is_bigendian = encoding, int(big)
            message.data = array("B", data.tobytes())
            messages.append(message)
        assert [account["outcome"] for account in node.send(*messages)] == ["first", "processed"], encoding
        node.until(lambda: node.flow, f"the flow of {encoding}")
        flows[encoding] = np.frombuffer(node.flow[-1].data, np.float32)
    assert np.ptp(flows["bgr8"]) > 0.0
    for encoding, flow in flows.items():  # those that hold the very picture give its very flow
        if encoding.startswith(("rgb", "bgr", "8UC3", "8UC4", "16UC3", "16UC4")):
            # 16 bits are seen by the counts that they use, not as they are.
            np.testing.assert_array_equal(flow, flows["bgr16" if "16" in encoding else "bgr8"], encoding)
        assert np.isfinite(flow).all(), encoding


def test_unreadable_images_are_dropped_by_name_and_the_stream_goes_on(node: NodeClient) -> None:
    """Drivers do send such messages; the frame is lost, the stream and the node are not."""
    node.send(node.image(), node.image())
    unknown, contradictory, short, empty, tiny = (node.image() for _ in range(5))
    unknown.encoding = "jpeg"
    contradictory.step = 100
    short.data = short.data[:-7]
    empty.height = empty.width = empty.step = 0
    del empty.data[:]
    tiny.height, tiny.width, tiny.step, tiny.data = 4, 4, 12, tiny.data[:48]
    accounts = node.send(unknown, contradictory, short, empty, tiny)
    assert [account["outcome"] for account in accounts] == ["dropped"] * 5
    words = ["unknown encoding 'jpeg': expected", "at least 192, got 100", "= 9216 bytes, got 9209", "got height 0"]
    words += ["at least 16x16 pixels, got 4x4"]
    for account, text in zip(accounts, words, strict=True):
        assert text in account["reason"]
    assert node.send(node.image())[0]["outcome"] == "processed"  # between the last good image and this one


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("size", "size changed from 64x48 to 80x32"),
        ("time back", "time went back by"),
        ("gap", "gap of 1"),
        ("encoding", "encoding changed from 'bgr8' to 'rgb8'"),
        ("camera", "frame_id changed from 'camera' to 'other'"),
    ],
)
def test_a_break_in_the_stream_resets_it_by_name(node: NodeClient, change: str, reason: str) -> None:
    """Flow between unrelated images is nonsense that looks like flow."""
    shape = (48, 64)
    node.send(node.image(), node.image())
    stamp_ns = node.next_stamp_ns
    if change == "size":
        shape = (32, 80)
    elif change == "time back":
        node.next_stamp_ns -= 10 * PERIOD_NS
    elif change == "gap":
        node.next_stamp_ns += 1_000_000_000
    images = [node.image(shape) for _ in range(3 if change == "time back" else 2)]
    for image in images:
        image.encoding = "rgb8" if change == "encoding" else "bgr8"
        image.header.frame_id = "other" if change == "camera" else "camera"
    node.next_stamp_ns = max(stamp_ns, node.next_stamp_ns)
    *late, first, second = node.send(*images)  # one image that is before the last may just be late
    assert all(account["reason"].endswith("left out") for account in late)
    assert first["outcome"] == "first" and reason in first["reason"]
    assert second["outcome"] == "processed" and reason in second["reset_reason"] and second["warm"] == "false"
    node.send(node.image())  # leave the stream as it was found


def test_images_sent_twice_late_or_without_a_stamp_are_left_out_by_name_and_the_stream_stays_warm(
    node: NodeClient,
) -> None:
    """Drivers do so all the time; each such image made two pairs cold, and nobody was told."""
    node.send(node.image(), node.image())
    twice, late = node.image(), node.image()
    after, unstamped, last = node.image(), node.image(), node.image()
    unstamped.header.stamp = Time()
    accounts = node.send(twice, twice, after, late, unstamped, last)
    assert [account.get("warm", account["reason"].rpartition(": ")[2]) for account in accounts] == [
        "true", "left out", "true", "left out", "left out", "true",
    ]  # fmt: skip
    assert accounts[1]["reason"].startswith("the same stamp as the frame before")
    assert accounts[3]["reason"] == "stamped 33.3 ms earlier than the frame before: left out"
    assert accounts[4]["reason"] == "without a stamp: left out"


def test_under_overload_the_newest_frame_wins_and_the_others_are_named(node: NodeClient) -> None:
    """A queue would make the flow ever later; a silent drop would leave frames unaccounted for."""
    images = [node.image((480, 640), seed=1, shift=number) for number in range(30)]
    for image in images:
        node.camera.publish(image)
    node.until(lambda: len(node.messages) >= len(images), "an account of each frame")
    node.spin_for(0.3)
    stamps = [account["image2_stamp_ns"] for account in node.accounts]
    assert len(stamps) == len(set(stamps)) == len(images)
    dropped = [account for account in node.accounts if account["outcome"] == "dropped"]
    assert dropped and {account["reason"] for account in dropped} == {"superseded by a newer frame"}
    newest = max(node.accounts, key=lambda account: int(account["image2_stamp_ns"]))
    assert newest["outcome"] == "processed"


def test_parameters_are_refused_with_a_reason_while_configured(node: NodeClient) -> None:
    """Accepting a value that has no effect would be a lie."""
    assert "device is read in configure" in node.set_parameters(device="cuda")
    assert "expected one of forward, backward, got 'up'" in node.set_parameters(direction="up")
    assert "Min: 0.0625" in node.set_parameters(min_scale=0.0)
    assert node.send(node.image())[0]["outcome"] in ("first", "processed")


def test_lifecycle_goes_round_and_bad_weights_fail_by_name(
    node: NodeClient, children: Children, tmp_path: Path
) -> None:
    """A manager that restarts the node must find it working, and a failing configure must leave it unconfigured."""
    weights = untrained_weights(tmp_path)
    truncated, foreign = tmp_path / "truncated.safetensors", tmp_path / "foreign.safetensors"
    truncated.write_bytes(weights.read_bytes()[:100_000])
    foreign.write_text("not weights")
    node.send(node.image(), node.image())
    assert node.change_state("deactivate") and node.state() == "inactive"
    assert node.camera.get_subscription_count() == 0
    assert node.change_state("cleanup") and node.state() == "unconfigured"
    bad = {"none.pt": (tmp_path / "none.pt", "cpu"), "truncated": (truncated, "cpu"), "foreign": (foreign, "cpu")}
    bad["cuda:99"] = (weights, "cuda:99")
    for model, device in bad.values():
        assert node.set_parameters(model=str(model), device=device) == ""
        assert not node.change_state("configure") and node.state() == "unconfigured"
    lines = [line for line in children.log("flow_node").read_text().splitlines() if "configure failed" in line]
    for line, value in zip(lines[-len(bad) :], bad, strict=True):
        assert value in line
    assert node.set_parameters(model=str(weights), device="cpu", direction="backward") == ""
    for _ in range(2):
        assert node.change_state("configure") and node.change_state("activate") and node.state() == "active"
        node.connect()
        images = [node.image(shift=number) for number in range(3)]
        accounts = node.send(*images)
        assert [account["outcome"] for account in accounts] == ["first", "processed", "processed"]
        check_header_rule(node, images, "backward")
        assert node.change_state("deactivate") and node.change_state("cleanup")
        node.forget()
    assert node.set_parameters(direction="forward") == ""
    assert node.change_state("configure") and node.change_state("activate")
    node.connect()


def restart(node: NodeClient, **parameters: object) -> None:
    assert node.change_state("deactivate") and node.change_state("cleanup")
    assert node.set_parameters(**parameters) == ""
    assert node.change_state("configure") and node.change_state("activate")


def test_with_the_default_qos_best_effort_images_come_through_and_losses_are_counted(node: NodeClient) -> None:
    """What ships is best effort, as most cameras are: nothing may get lost uncounted, and little at a camera's rate."""
    restart(node, qos_reliability=NodeSettings.qos_reliability, qos_depth=NodeSettings.qos_depth)
    node.replace_camera(qos_profile_sensor_data)
    node.connect()
    for shape, period_s, least in (((120, 160), 0.05, 0.8), ((480, 640), 0.0, 0.0)):  # a camera, and a burst
        before = node.send(node.image(shape))[0]
        node.forget()
        images = [node.image(shape, shift=number) for number in range(40)]
        for image in images:
            node.camera.publish(image)
            node.spin_for(period_s)
        node.spin_for(1.0)
        # What got lost after the last image that arrived shows only when another one arrives.
        images.append(node.image(shape))
        node.camera.publish(images[-1])
        node.until(lambda last=images[-1]: last.header in [m.header for m in node.messages], "the account of the last")
        node.spin_for(0.3)
        newest = max(node.accounts, key=lambda account: sum(int(account[f"frames_{name}"]) for name in COUNTERS))
        counted = {name: int(newest[f"frames_{name}"]) - int(before[f"frames_{name}"]) for name in COUNTERS}
        assert counted["processed"] + counted["first"] + counted["dropped"] == counted["received"] == len(node.accounts)
        assert counted["received"] + counted["lost"] == len(images), counted
        assert counted["received"] >= least * len(images)
    restart(node, qos_reliability="reliable", qos_depth=100)
    node.replace_camera(QoSProfile(depth=100))
    node.connect()


def test_a_wrong_parameter_at_start_ends_the_process_with_its_name(children: Children) -> None:
    """Started with something else than what was asked for, the node would run on unnoticed."""
    children.start("wrong", "deq_flow_ros.ros.flow_node", node_arguments("__node:=wrong", direction="up"))
    children.processes["wrong"].wait(60.0)
    with pytest.raises(ChildError, match="ended with status 2") as error:
        children.check()
    assert "flow_node: " in str(error.value) and "expected one of forward, backward, got 'up'" in str(error.value)
