# SPDX-License-Identifier: Apache-2.0
"""What `/diagnostics` says: the figures are right, and the message names what is wrong and what to do."""

import threading
import time
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
import torch
from diagnostic_msgs.msg import DiagnosticStatus
from std_msgs.msg import Header

from deq_flow_ros.ros.diagnostics import FrameAccounts
from deq_flow_ros.ros.health import MAX_KINDS, MAX_REASON, CameraHealth, Health
from deq_flow_ros.ros.window import RATE_LIMITED, SUPERSEDED, kind_of
from deq_flow_ros.streaming import FlowInfo

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK,
    DiagnosticStatus.WARN,
    DiagnosticStatus.ERROR,
    DiagnosticStatus.STALE,
)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def info(**changes: Any) -> FlowInfo:
    """Of an ordinary warm pair: 4 iterations in 60 of 90 ms."""
    values = {
        "stamp_ns": 2,
        "previous_stamp_ns": 1,
        "direction": "forward",
        "iterations": 4,
        "stop_reason": "converged",
        "warm": True,
        "residual_px": 0.04,
        "reset_reason": None,
        "scale": 0.5,
        "stage_ms": {"encode": 10.0, "solve": 40.0},
        "latency_ms": 60.0,
        "budget_ms": 90.0,
        "starved": False,
    }
    return FlowInfo(**{**values, **changes})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def camera(clock: Clock) -> CameraHealth:
    camera = CameraHealth("/camera/image", window_s=10.0, clock=clock)
    clock.now_s += 1000.0  # started long ago
    return camera


def run(camera: CameraHealth, clock: Clock, seconds: float = 10.0, every_s: float = 0.1, **changes: Any) -> None:
    """A camera at `1 / every_s` Hz all of whose frames are processed."""
    for _ in range(round(seconds / every_s)):
        camera.received(0)
        camera.accounted("processed", age_ms=5.0, info=info(**changes), stage_ms={"wait": 2.0, "publish": 1.0})
        clock.now_s += every_s


def look(camera: CameraHealth) -> tuple[bytes, str, dict[str, str]]:
    status = camera.status("flow_node: front")
    assert status.name == "flow_node: front"
    return status.level, status.message, {pair.key: pair.value for pair in status.values}


def test_figures_are_those_of_the_window_alone(camera: CameraHealth, clock: Clock) -> None:
    """A mean since the start hides that the node has become slow a minute ago."""
    run(camera, clock, seconds=60.0, latency_ms=500.0, iterations=1)
    clock.now_s += 5.0
    for latency in range(1, 101):
        run(camera, clock, seconds=0.1, latency_ms=float(latency))
    level, message, values = look(camera)
    assert level == WARN and "10 of 100 flow fields came after the budget of 90 ms" in message
    expected = {
        "image_topic": "/camera/image", "in_hz": "10.00", "out_hz": "10.00", "lost": "0", "dropped": "0",
        "latency_p50_ms": "50.5", "latency_p95_ms": "95.0", "latency_p99_ms": "99.0", "budget_ms": "90",
        "deadline_misses": "10", "iterations_mean": "4.00", "scale_min": "0.5", "warm_share": "1.000",
        "stage_solve_ms": "40.00", "stage_wait_ms": "2.00", "input_age_p50_ms": "5.0", "resets": "0",
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    clock.now_s += 20.0
    assert look(camera)[2]["in_hz"] == "0.00"


def test_when_all_is_well_the_message_says_where_the_time_goes(camera: CameraHealth, clock: Clock) -> None:
    """ "Why is it slow" must not need a profiler: the slowest stage, and that a camera is too fast, stand there."""
    run(camera, clock)
    level, message, _ = look(camera)
    assert (level, message) == (
        OK, "10.0 flow fields/s from 10.0 images/s, latency 60 ms, most of it solve (40 ms)",
    )  # fmt: skip
    for _ in range(50):
        camera.received(0)
        camera.accounted("dropped", SUPERSEDED)
    level, message, values = look(camera)
    assert level == OK and "newer images supersede waiting ones" in message
    assert (values["dropped"], values[f"dropped: {SUPERSEDED}"]) == ("50", "50")


def bad_images(camera: CameraHealth) -> None:
    for size in range(3):
        camera.accounted("dropped", f"expected 9216 bytes, got {size}")


@pytest.mark.parametrize(
    ("trouble", "level", "words"),
    [
        (bad_images, WARN, ["3 images could not be used", "expected N bytes, got N"]),
        (lambda camera: run(camera, camera._clock, latency_ms=91.0), WARN, ["`threads`", "raise latency_budget_ms"]),
        (
            lambda camera: run(camera, camera._clock, latency_ms=120.0, starved=True),
            WARN,
            ["budget of 90 ms cannot be met", "lower min_scale"],
        ),
        (lambda camera: camera.received(30), WARN, ["30 images were lost on the way", "config/fastdds.xml"]),
        (lambda camera: run(camera, camera._clock, stop_reason="diverged"), ERROR, ["diverged 100 times", "weights"]),
        (lambda camera: setattr(camera, "idle", "disabled by ~/enable"), OK, ["disabled by ~/enable"]),
        (lambda camera: setattr(camera, "silence", "no image for 7 s: nobody"), STALE, ["no image for 7 s: nobody"]),
    ],
    ids=["unusable", "late", "starved", "lost", "diverged", "disabled", "silent"],
)
def test_each_trouble_has_a_level_and_says_what_to_do(
    camera: CameraHealth, clock: Clock, trouble: Any, level: bytes, words: list[str]
) -> None:
    """Whoever reads it at night has nothing else to go by."""
    run(camera, clock)
    assert look(camera)[0] == OK
    trouble(camera)
    got, message, _ = look(camera)
    assert got == level and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("age_ms", "words"),
    [(3200.0, "stamps are 3.2 s old on arrival"), (-500.0, "stamps are 0.5 s in the future"), (20.0, "")],
)
def test_clocks_that_do_not_agree_are_seen(camera: CameraHealth, age_ms: float, words: str) -> None:
    """Old stamps look like latency, future ones break what is synchronised by them."""
    camera.accounted("first", "start", age_ms=age_ms)
    level, message, values = look(camera)
    assert (level == WARN) == bool(words) and words in message and values["input_age_max_ms"] == f"{age_ms:.1f}"


def test_unusable_images_alone_are_an_error(camera: CameraHealth) -> None:
    """No flow will ever come of it."""
    bad_images(camera)
    assert look(camera)[0] == ERROR
    camera.accounted("dropped", RATE_LIMITED)
    camera.accounted("first", "start")
    assert look(camera)[0] == WARN


def without_flow(camera: CameraHealth, clock: Clock, outcome: str, reason: str, seconds: float) -> None:
    """A camera at 10 Hz none of whose frames gives flow, as FrameAccounts tells of it."""
    for _ in range(round(10 * seconds)):
        camera.received(0)
        camera.accounted(outcome, reason, age_ms=5.0)
        clock.now_s += 0.1


@pytest.mark.parametrize(
    ("outcome", "reason", "level", "words"),
    [
        ("dropped", SUPERSEDED, ERROR, ["the worker is not answering", "100 images", "restart the node"]),
        ("first", "gap of 1500 ms, longer than 1000 ms", WARN, ["100 times", "gap of N ms", "raise max_gap_ms"]),
        ("first", "time stood still: two frames with one stamp", WARN, ["stood still", "mend the camera's stamps"]),
        ("first", "frame_id changed from 'a' to 'b'", WARN, ["frame_id changed", "ros2 topic info -v"]),
        ("first", "asked for by ~/reset", WARN, ["asked for by ~/reset", "~/statistics"]),
    ],
    ids=["worker", "gaps", "stamps", "two cameras", "other"],
)
def test_images_without_any_flow_are_not_well(
    camera: CameraHealth, clock: Clock, outcome: str, reason: str, level: bytes, words: list[str]
) -> None:
    """A node that takes in images and gives out nothing is what these statuses are there for."""
    without_flow(camera, clock, outcome, reason, 9.5)
    assert look(camera)[0] == OK  # a first pair may take its time
    without_flow(camera, clock, outcome, reason, 10.5)
    got, message, _ = look(camera)
    assert got == level and "no flow in the last 10 s" in message and all(word in message for word in words), message
    run(camera, clock, seconds=1.0)
    assert look(camera)[0] == OK
    clock.now_s += 60.0  # silence, and then the first image again
    without_flow(camera, clock, outcome, reason, 1.0)
    assert look(camera)[0] == OK


def test_images_that_wait_for_their_turn_are_well(camera: CameraHealth, clock: Clock) -> None:
    """One image in a minute was asked for: none of the others within ten seconds is a fault."""
    without_flow(camera, clock, "dropped", RATE_LIMITED, 20.0)
    assert look(camera)[0] == OK


def test_a_reset_is_counted_once_whether_a_pair_follows_or_not(camera: CameraHealth, clock: Clock) -> None:
    """A stream that starts with every image has no pair to tell of it, and was said never to have started."""
    for number in range(4):
        without_flow(camera, clock, "first", f"gap of {2000 + number} ms, longer than 1000 ms", 0.1)
        without_flow(camera, clock, "dropped", SUPERSEDED, 0.1)
    assert [look(camera)[2][key] for key in ("resets", "last_reset")] == ["4", "gap of 2003 ms, longer than 1000 ms"]
    run(camera, clock, seconds=0.1, reset_reason="gap of 2003 ms, longer than 1000 ms")
    assert look(camera)[2]["resets"] == "4"
    run(camera, clock, seconds=0.1, stop_reason="diverged")
    run(camera, clock, seconds=0.1, reset_reason="the state was not finite")
    assert [look(camera)[2][key] for key in ("resets", "last_reset")] == ["5", "the state was not finite"]


def test_reasons_are_grouped_and_never_grow_without_bound(camera: CameraHealth) -> None:
    """A hostile camera must not fill the memory with words of its own."""
    assert kind_of("step at least 192, got 100") == kind_of("step at least 24, got 2.5")
    assert kind_of("got 'jpeg'") == kind_of("got 'x 1'") != kind_of("missing 'x'")
    for number in range(5000):
        letters = "".join(chr(97 + int(digit)) for digit in str(number))
        camera.accounted("dropped", f"a reason of its own: {letters}{'!' * 500}")
    kinds = {name: count for name, count in look(camera)[2].items() if name.startswith("dropped: ")}
    assert len(kinds) == MAX_KINDS + 1 and sum(map(int, kinds.values())) == 5000 and max(map(len, kinds)) < 100
    assert len(camera._kinds) == MAX_KINDS
    camera.accounted("first", f"frame_id changed from 'a' to '{'b' * 100_000}'")
    assert len(look(camera)[2]["last_reset"]) == MAX_REASON


def test_memory_is_that_of_one_window(camera: CameraHealth, clock: Clock) -> None:
    """The node runs for weeks."""
    run(camera, clock, seconds=100.0)
    assert len(camera._samples) <= 101 and len(camera._received) <= 101


def test_frames_may_come_while_a_status_is_made() -> None:
    """The worker counts while the executor reports; no frame may get lost between them."""
    camera = CameraHealth("/camera/image")

    def frames() -> None:
        for _ in range(2000):
            camera.received(0)
            camera.accounted("processed", info=info())

    threads = [threading.Thread(target=frames) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        look(camera)
    assert camera.window().received == len(camera.window().infos) == 4000


def test_taking_in_a_frame_costs_next_to_nothing() -> None:
    """Measuring must not be what makes it slow; typically 3 to 5 us, the bound is for a busy machine."""
    camera, one = CameraHealth("/camera/image"), info()
    costs = []
    for _ in range(20):
        started = time.thread_time()
        for _ in range(100):
            camera.received(0)
            camera.accounted("processed", "", 1.0, one, {})
        costs.append((time.thread_time() - started) / 100)
    assert min(costs) < 100e-6


def test_accounts_feed_the_health_and_name_camera_and_age() -> None:
    """Whoever records `~/statistics` alone must know which camera it was and how old its images were."""
    camera = CameraHealth("/front/image")
    accounts = FrameAccounts("cpu", "forward", "front", camera)
    header = Header(frame_id="camera")
    for _ in range(3):
        accounts.received(1)
    sent = [
        accounts.first(header, "start", 4.0),
        accounts.processed(header, info(direction="backward"), {"publish": 1.0}, 5.0),
        accounts.dropped(header, SUPERSEDED),
    ]
    values = [{pair.key: pair.value for pair in message.status[0].values} for message in sent]
    assert [value["camera"] for value in values] == ["front"] * 3
    assert [value["age_ms"] for value in values] == ["4.000", "5.000", ""]
    assert [value["direction"] for value in values] == ["forward", "backward", "forward"]
    assert {message.status[0].name for message in sent} == {"deq_flow_ros: flow front"}
    window = camera.window()
    assert (window.received, window.lost, len(window.infos), window.drops) == (3, 3, 1, {SUPERSEDED: 1})
    assert window.stage_means == {"encode": 10.0, "solve": 40.0, "publish": 1.0}


def test_the_process_has_a_status_through_its_whole_life() -> None:
    """A node that could not be configured is the one that somebody looks for."""
    health = Health("/robot/flow_node")

    def process() -> DiagnosticStatus:
        return health.statuses()[0]

    assert (process().name, process().level, process().message) == ("robot/flow_node: process", OK, "not configured")
    health.cleaned_up("configure failed: no weights 'x.pt'")
    assert (process().level, process().message) == (ERROR, "configure failed: no weights 'x.pt'")
    health.configured(torch.device("cpu"), model="nano", threads=1)
    health.cameras = {"": CameraHealth("/a"), "rear": CameraHealth("/b")}
    names = [status.name for status in health.statuses()]
    assert names == ["robot/flow_node: process", "robot/flow_node: flow", "robot/flow_node: rear"]
    values = {pair.key: pair.value for pair in process().values}
    assert (process().level, process().hardware_id, values["model"], values["threads"]) == (OK, "cpu", "nano", "1")
    assert process().message.startswith("nano on cpu, ")
    assert 20.0 < float(values["rss_mb"]) <= float(values["rss_peak_mb"])
    health.cleaned_up()
    assert [status.message for status in health.statuses()] == ["not configured"]
