# SPDX-License-Identifier: Apache-2.0
"""What people and launch systems do to a running `flow_node`: parameters, services, transitions."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from diagnostic_msgs.msg import DiagnosticArray
from node_client import CAMERA_TOPIC, PERIOD_NS, NodeClient, running_node
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo
from std_srvs.srv import SetBool, Trigger

from deq_flow_ros.host import Children
from deq_flow_ros.ros.accounts import RATE_LIMITED
from deq_flow_ros.ros.parameters import NodeSettings


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeClient, Children]]:
    folder, remapping = tmp_path_factory.mktemp("node"), f"~/image:={CAMERA_TOPIC}"
    with running_node(folder, remapping, diagnostics_period_s=0.2) as running:
        running[0].connect()
        yield running


def flow_size(node: NodeClient) -> tuple[int, int]:
    """Height and width of the next flow that comes."""
    node.until(lambda: node.flow, "a flow field")
    return node.flow[-1].height, node.flow[-1].width


def camera_info(focal_px: float) -> CameraInfo:
    """Of the test camera's 64x48 images."""
    message = CameraInfo(width=64, height=48, distortion_model="plumb_bob", d=[0.0] * 5)
    message.k = [focal_px, 0.0, 32.0, 0.0, 2 * focal_px, 24.0, 0.0, 0.0, 1.0]
    message.p = [focal_px, 0.0, 32.0, 0.0, 0.0, 2 * focal_px, 24.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    return message


def test_a_live_parameter_takes_effect_with_the_next_image(node: NodeClient) -> None:
    """A user who turns a knob and sees no change looks for the fault elsewhere."""
    assert node.set_parameters(max_iterations=1) == ""
    assert node.send(node.image())[0]["iterations"] == "1"
    assert node.set_parameters(max_iterations=2) == ""
    assert node.send(node.image())[0]["iterations"] == "2"
    assert node.set_parameters(direction="backward") == ""
    first, second = node.send(node.image(), node.image())
    assert first["outcome"] == "first" and "direction changed from forward to backward" in first["reason"]
    assert (first["direction"], second["direction"]) == ("backward", "backward")
    node.set_parameters(direction="forward")
    assert node.set_parameters(output_scale=0.5) == ""
    node.send(node.image(), node.image())
    assert flow_size(node) == (24, 32)
    node.set_parameters(output_scale=1.0)
    assert node.set_parameters(max_gap_ms=3.6e6, max_rate_hz=0.001) == ""
    outcomes = [account["reason"] for account in node.send(node.image(), node.image(), node.image())]
    assert outcomes[1:] == [RATE_LIMITED] * 2
    node.set_parameters(max_rate_hz=0.0, max_gap_ms=1000.0)


def test_a_region_is_cut_out_and_a_wrong_one_is_named(node: NodeClient) -> None:
    """A region moved within one stream would look like motion of the whole scene."""
    assert node.set_parameters(roi=[8, 4, 32, 24]) == ""
    first, second = node.send(node.image(shift=0), node.image(shift=0))
    assert "roi changed from [0, 0, 0, 0] to [8, 4, 32, 24]" in first["reason"] and second["outcome"] == "processed"
    node.until(lambda: len(node.flow) == 1, "one flow field")
    assert flow_size(node) == (24, 32)
    node.set_parameters(roi=[40, 0, 32, 24])
    dropped = node.send(node.image())[0]
    assert dropped["outcome"] == "dropped"
    assert dropped["reason"].startswith("roi [40, 0, 32, 24] reaches outside of the image, 64x48; set the parameter")
    assert node.set_parameters(roi=[0, 0, 0, 0]) == ""
    assert node.send(node.image())[0]["outcome"] == "first"


def test_limits_that_contradict_each_other_are_refused_together_and_taken_together(node: NodeClient) -> None:
    """Each is in range; one at a time they would stop every image."""
    assert "min_scale <= max_scale, got 2 and 1" in node.set_parameters(min_scale=2.0)
    assert "no parameter 'min_scal' (did you mean 'min_scale'?)" in node.set_parameters(min_scal=2.0)
    assert node.set_parameters(max_gap_ms=1000) == ""  # a whole number for a real one
    request = SetParametersAtomically.Request()
    request.parameters = [Parameter(n, value=2.0).to_parameter_msg() for n in ("min_scale", "max_scale")]
    assert node.call(SetParametersAtomically, "set_parameters_atomically", request).result.successful
    node.send(node.image())
    assert node.send(node.image())[0]["scale"] == "2"
    for name in ("min_scale", "max_scale"):
        assert node.set_parameters(**{name: getattr(NodeSettings, name)}) == ""


def send_pair(node: NodeClient) -> dict[str, str]:
    """Send the same two images, as the start of a stream; returns the account of the second."""
    node.call(Trigger, "reset", Trigger.Request())
    node.forget()
    return node.send(node.image(shift=0), node.image(shift=1))[1]


def flow_of_pair(node: NodeClient) -> np.ndarray:
    """(48, 64, 2) flow of it."""
    assert send_pair(node)["outcome"] == "processed"
    node.until(lambda: node.flow, "a flow field")
    return np.frombuffer(node.flow[0].data, np.float32).reshape(48, 64, 2)


def test_normalized_units_need_camera_info_and_follow_it(node: NodeClient) -> None:
    """Pixels taken for velocities would steer a robot wrongly; so would the calibration of another axis."""
    pixels = flow_of_pair(node)
    assert node.set_parameters(units="normalized_per_second") == ""
    account = send_pair(node)
    assert account["outcome"] == "dropped" and "none has come on /camera/camera_info" in account["reason"]
    publisher = node.create_publisher(CameraInfo, "/camera/camera_info", 10)
    calibrations: list[CameraInfo] = []
    best_effort = rclpy.qos.qos_profile_sensor_data
    subscription = node.create_subscription(CameraInfo, "/flow_node/camera_info", calibrations.append, best_effort)
    node.until(lambda: publisher.get_subscription_count() == 1, "the node to subscribe to camera_info")
    for focal_px in (100.0, 200.0):
        calibrations.clear()
        for _ in range(100):  # each side learns of the other by itself
            publisher.publish(camera_info(focal_px))
            send_pair(node)
            if calibrations and calibrations[-1].k[0] == focal_px:
                break
        per_second = pixels / (focal_px, 2 * focal_px) / (PERIOD_NS * 1e-9)
        np.testing.assert_allclose(flow_of_pair(node), per_second, rtol=1e-3, atol=1e-3)
        node.until(lambda: calibrations[-1].header == node.flow[-1].header, "the calibration of that field")
    node.set_parameters(units="px")
    node.destroy_subscription(subscription)
    node.destroy_publisher(publisher)


def test_disabled_the_node_is_unsubscribed_and_enabled_it_starts_anew(node: NodeClient) -> None:
    """Disabled it must cost nothing; and flow across the pause would be nonsense."""
    assert node.call(SetBool, "enable", SetBool.Request(data=False)).success
    node.until(lambda: node.camera.get_subscription_count() == 0, "the node to unsubscribe")
    assert node.state() == "active"
    answer = node.call(SetBool, "enable", SetBool.Request(data=False))
    assert answer.success and answer.message == "disabled"
    assert node.call(SetBool, "enable", SetBool.Request(data=True)).success
    node.until(lambda: node.camera.get_subscription_count() == 1, "the node to subscribe")
    node.connect()
    first, second = node.send(node.image(), node.image())
    assert first["outcome"] == "first" and "disabled by ~/enable" in first["reason"]
    assert second["outcome"] == "processed"


def test_reset_starts_the_stream_anew(node: NodeClient) -> None:
    """After a robot was carried elsewhere, nothing of before may lead the flow."""
    assert node.call(Trigger, "reset", Trigger.Request()).success
    first, second = node.send(node.image(), node.image())
    assert first["outcome"] == "first" and first["reason"] == "asked for by ~/reset" == second["reset_reason"]


def test_a_snapshot_holds_the_pair_and_disturbs_nothing(node: NodeClient, tmp_path: Path) -> None:
    """A bug report without the images that led to it cannot be followed."""
    assert node.set_parameters(snapshot_folder=str(tmp_path / "reports")) == ""
    answers = [node.call(Trigger, "snapshot", Trigger.Request()) for _ in range(2)]
    folders = [Path(answer.message) for answer in answers]
    assert all(answer.success for answer in answers) and folders[0] != folders[1]
    for folder in folders:
        assert folder.parent == tmp_path / "reports"
        names = {path.name for path in folder.iterdir()}
        assert names >= {"image1.png", "image2.png", "flow.flo", "state.npz", "snapshot.json"}
    assert node.send(node.image())[0]["warm"] == "true"  # the stream went on
    (tmp_path / "file").write_text("")
    node.set_parameters(snapshot_folder=str(tmp_path / "file"))
    answer = node.call(Trigger, "snapshot", Trigger.Request())
    assert not answer.success and str(tmp_path / "file") in answer.message
    node.set_parameters(snapshot_folder="")


@pytest.mark.parametrize(("delay_s", "counted_from"), [(0.2, "stamp"), (-5.0, "arrival"), (60.0, "arrival")])
def test_a_budget_from_the_stamp_counts_the_delay_where_it_can_be_believed(
    node: NodeClient, delay_s: float, counted_from: str
) -> None:
    """With clocks that differ, every deadline would be past, or never come."""
    assert node.set_parameters(latency_from="stamp", latency_budget_ms=10_000.0) == ""
    node.call(Trigger, "reset", Trigger.Request())  # these stamps are of another time than those before
    images = [node.image(), node.image()]
    for number, image in enumerate(images):
        now_ns = node.get_clock().now().nanoseconds + number * PERIOD_NS - round(delay_s * 1e9)
        image.header.stamp.sec, image.header.stamp.nanosec = divmod(now_ns, 10**9)
    account = node.send(*images)[1]
    assert account["latency_from"] == counted_from
    assert float(account["age_ms"]) == pytest.approx(1e3 * delay_s, abs=1e3)
    assert (float(account["latency_ms"]) > 1e3 * delay_s - PERIOD_NS * 1e-6) == (counted_from == "stamp" or delay_s < 0)
    node.set_parameters(latency_from="arrival", latency_budget_ms=0.0)


def test_silence_is_told_with_its_reason_and_so_is_its_end(node: NodeClient, log: Path) -> None:
    """A node that gives nothing and says nothing is the usual complaint."""
    before = len(log.read_text())

    def new_lines(words: str) -> list[str]:
        return [line for line in log.read_text()[before:].splitlines() if words in line]

    assert node.set_parameters(silence_warning_s=0.3) == ""
    node.until(lambda: len(new_lines("no image for")) >= 2, "two warnings")  # at doubling intervals
    assert all(CAMERA_TOPIC in line for line in new_lines("no image for"))
    node.send(node.image())
    node.until(lambda: new_lines(f"images come on {CAMERA_TOPIC} after"), "the end of it")
    node.set_parameters(silence_warning_s=0.0)


def test_a_budget_that_cannot_be_met_is_told_with_what_is_done(node: NodeClient, log: Path) -> None:
    """Flow that is always late looks like a slow network; the remedy is elsewhere."""
    assert node.set_parameters(latency_budget_ms=0.1) == ""
    account = node.send(*(node.image() for _ in range(24)))[-1]  # one alone may be late for another reason
    assert (account["starved"], account["over_budget"], account["iterations"]) == ("true", "true", "1")
    node.until(lambda: "the budget of 0.1 ms cannot be met" in log.read_text(), "the warning")
    node.set_parameters(latency_budget_ms=0.0)
    node.send(node.image())  # from here on there is none that could be named
    received: list[DiagnosticArray] = []
    subscription = node.create_subscription(DiagnosticArray, "/diagnostics", received.append, 10)
    node.until(lambda: received, "diagnostics", timeout_s=5.0)
    assert "the budget of 0.1 ms cannot be met" in received[0].status[1].message
    node.destroy_subscription(subscription)


def test_diagnostics_name_process_and_camera(node: NodeClient) -> None:
    """What a robot's monitor shows of the node."""
    received: list[DiagnosticArray] = []
    subscription = node.create_subscription(DiagnosticArray, "/diagnostics", received.append, 10)
    node.until(lambda: received, "diagnostics")
    node.send(node.image())
    received.clear()
    node.until(lambda: received, "diagnostics of the frame")
    statuses = {status.name: {pair.key: pair.value for pair in status.values} for status in received[-1].status}
    assert set(statuses) == {"flow_node: process", "flow_node: flow"}
    assert float(statuses["flow_node: process"]["rss_mb"]) > 50 and float(statuses["flow_node: flow"]["in_hz"]) > 0
    node.destroy_subscription(subscription)


def test_a_transition_that_the_state_does_not_have_is_refused(node: NodeClient, log: Path) -> None:
    """rclpy raises an error then, which would end the node, and the caller would wait for ever."""
    assert not node.change_state("activate") and not node.change_state("cleanup")
    words = "activate was refused: the node is active, and possible from there are deactivate, shutdown"
    assert node.state() == "active" and words in log.read_text()
    assert node.send(node.image())[0]["outcome"] == "processed"


def resident_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def test_twenty_lifecycle_cycles_do_not_grow(running: tuple[NodeClient, Children], node: NodeClient) -> None:
    """A manager may restart the node for months."""
    process = running[1].processes["flow_node"].pid
    sizes = []
    for _ in range(20):
        assert node.change_state("deactivate") and node.change_state("cleanup")
        assert node.count_publishers("/flow_node/flow") <= 1
        assert node.change_state("configure") and node.change_state("activate")
        node.forget()
        node.connect()
        node.send(node.image(), node.image())
        node.forget()
        sizes.append(resident_mb(process))
    assert sizes[-1] < 1.02 * sizes[9], sizes
    assert node.state() == "active"
