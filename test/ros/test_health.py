# SPDX-License-Identifier: Apache-2.0
"""What `/diagnostics` says: the figures are right, and the message names what is wrong and what to do."""

from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
import torch
from diagnostic_msgs.msg import DiagnosticStatus
from frame_accounts import HEADER, CameraAt

from deq_flow_ros.imaging.encodings import ENCODINGS, EncodingError, check_layout
from deq_flow_ros.ros.accounts import RATE_LIMITED, SUPERSEDED
from deq_flow_ros.ros.health import Clocks, ProcessStatus, camera_status
from deq_flow_ros.streaming.continuity import SAME_STAMP

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
STALE = DiagnosticStatus.STALE


@pytest.fixture
def camera() -> CameraAt:
    return CameraAt()


def look(camera: CameraAt, **why: Any) -> tuple[bytes, str, dict[str, str]]:
    """Level, message and values of its status."""
    status = camera_status("flow_node: front", "/camera/image", camera.accounts.window(), **why)
    assert status.name == "flow_node: front"
    return status.level, status.message, {pair.key: pair.value for pair in status.values}


def test_figures_are_those_of_the_window_alone(camera: CameraAt) -> None:
    """A mean since the start hides that the node has become slow a minute ago."""
    camera.runs(seconds=60.0, latency_ms=500.0, iterations=1)
    camera.now_s += 5.0
    for latency in range(1, 101):
        camera.runs(seconds=0.1, latency_ms=float(latency))
    level, message, values = look(camera)
    assert level == WARN and "10 of 100 flow fields came after the budget of 90 ms" in message
    expected = {
        "image_topic": "/camera/image", "in_hz": "10.00", "out_hz": "10.00", "lost": "0", "dropped": "0",
        "latency_p50_ms": "50.5", "latency_p95_ms": "95.0", "latency_p99_ms": "99.0", "budget_ms": "90",
        "deadline_misses": "10", "iterations_mean": "4.00", "scale_min": "0.5", "warm_share": "1.000",
        "stage_solve_ms": "40.00", "stage_wait_ms": "2.00", "input_age_p50_ms": "5.0", "resets": "0",
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    camera.now_s += 20.0
    assert look(camera)[2]["in_hz"] == "0.00"


def test_when_all_is_well_the_message_says_where_the_time_goes(camera: CameraAt) -> None:
    """ "Why is it slow" must not need a profiler: the slowest stage, and that a camera is too fast, stand there."""
    camera.runs()
    level, message, _ = look(camera)
    assert (level, message) == (
        OK, "10.0 flow fields/s from 10.0 images/s, latency 60 ms, most of it solve (40 ms)",
    )  # fmt: skip
    for _ in range(50):
        camera.arrives(0)
        camera.accounts.dropped(HEADER, SUPERSEDED)
    level, message, values = look(camera)
    assert level == OK and "50 of 150 images were superseded by newer ones" in message
    assert (values["dropped"], values[f"dropped: {SUPERSEDED}"]) == ("50", "50")


def bad_images(camera: CameraAt) -> None:
    for size in range(3):
        camera.accounts.dropped(HEADER, f"expected 9216 bytes, got {size}")


@pytest.mark.parametrize(
    ("trouble", "level", "words"),
    [
        (bad_images, WARN, ["3 images could not be used", "expected 9216 bytes, got 2"]),
        (lambda camera: camera.runs(latency_ms=91.0), WARN, ["`threads`", "raise latency_budget_ms"]),
        (
            lambda camera: camera.runs(latency_ms=120.0, starved=True),
            WARN,
            ["budget of 90 ms cannot be met", "lower min_scale"],
        ),
        (lambda camera: camera.arrives(30), WARN, ["30 images were lost on the way", "config/fastdds.xml"]),
        (lambda camera: camera.runs(stop_reason="diverged"), ERROR, ["diverged 100 times", "weights"]),
    ],
    ids=["unusable", "late", "starved", "lost", "diverged"],
)
def test_each_trouble_has_a_level_and_says_what_to_do(
    camera: CameraAt, trouble: Any, level: bytes, words: list[str]
) -> None:
    """Whoever reads it at night has nothing else to go by."""
    camera.runs()
    assert look(camera)[0] == OK
    trouble(camera)
    got, message, _ = look(camera)
    assert got == level and all(word in message for word in words), message


def test_a_camera_without_images_says_why(camera: CameraAt) -> None:
    """What came before is of no interest then."""
    bad_images(camera)
    assert look(camera, idle="disabled by ~/enable")[:2] == (OK, "disabled by ~/enable")
    assert look(camera, silence="no image for 7 s: nobody")[:2] == (STALE, "no image for 7 s: nobody")


@pytest.mark.parametrize(
    ("age_ms", "words"),
    [(3200.0, "stamps are 3.2 s old on arrival"), (-500.0, "stamps are 0.5 s in the future"), (20.0, "")],
)
def test_clocks_that_do_not_agree_are_seen(camera: CameraAt, age_ms: float, words: str) -> None:
    """Old stamps look like latency, future ones break what is synchronised by them."""
    camera.accounts.first(HEADER, "start", age_ms)
    level, message, values = look(camera)
    assert (level == WARN) == bool(words) and words in message and values["input_age_max_ms"] == f"{age_ms:.1f}"


YEAR_MS = 365.25 * 86400e3


@pytest.mark.parametrize(
    ("age_ms", "clocks", "level", "words"),
    [
        (5 * YEAR_MS, Clocks(played=True), OK, "stamps are 5.0 years old on arrival, as those of a recording are"),
        (3600e3, Clocks(played=True), OK, "stamps are 60.0 minutes old on arrival, as those of a recording are"),
        (5 * YEAR_MS, Clocks(), OK, "those of a recording are, or of a camera whose clock was never set"),
        (5 * YEAR_MS, Clocks(played=True, offered=True), WARN, "/clock is published: set use_sim_time"),
        (9000.0, Clocks(simulated=True, offered=True), WARN, "it and the images do not belong to one recording"),
        (-500.0, Clocks(simulated=True, offered=True), OK, "flow fields/s"),
        (9000.0, Clocks(simulated=True), OK, "nobody publishes /clock: how old the images are is not known"),
        (9000.0, Clocks(), WARN, "stamps are 9.0 s old on arrival: synchronise the clocks"),
    ],
)
def test_stamps_of_a_recording_are_no_fault(
    camera: CameraAt, age_ms: float, clocks: Clocks, level: bytes, words: str
) -> None:
    """Every replay warned, and was told to take a time from /clock that nobody publishes."""
    camera.runs(age_ms=age_ms)
    got, message, _ = look(camera, clocks=clocks)
    assert got == level and words in message and message.startswith("stamps are" if level == WARN else "10.0 flow")


def test_stamps_in_another_unit_are_told_from_clocks_that_differ(camera: CameraAt) -> None:
    """Stamps of microseconds that were meant to be milliseconds: velocities are a thousand times too high."""
    for second in range(12):
        camera.runs(seconds=1.0, age_ms=999.0 * second)
    assert "stamps advance by 0.1" in look(camera)[1] and "advance" not in look(camera, clocks=Clocks(played=True))[1]


def test_the_worst_is_named_first_and_all_is_told(camera: CameraAt) -> None:
    """One warning hid that half of the images were superseded, and another that none could be used."""
    camera.runs(stop_reason="diverged", age_ms=9000.0)
    for _ in range(100):
        camera.accounts.arrivals.append((camera.now_s, 0))
        camera.accounts.dropped(HEADER, SUPERSEDED)
    bad_images(camera)
    level, message, _ = look(camera)
    order = ["the solver diverged", "could not be used", "stamps are 9.0 s old", "100 of 200 images were superseded"]
    places = [message.find(words) for words in order]
    assert level == ERROR and -1 not in places and places == sorted(places), message


def test_images_that_come_twice_are_told_and_a_single_late_one_is_not(camera: CameraAt) -> None:
    """A driver that sends everything twice is at fault; a message that is late now and then is no news."""
    camera.runs()
    camera.accounts.dropped(HEADER, "stamped 33.3 ms earlier than the frame before: left out")
    assert look(camera)[0] == OK
    for _ in range(50):
        camera.accounts.dropped(HEADER, SAME_STAMP)
    level, message, values = look(camera)
    assert level == WARN
    assert "51 of 100 images were left out in the last 10 s: the same stamp as the frame before" in message
    assert "mend the camera's stamps" in message and values[f"dropped: {SAME_STAMP}"] == "50"


def test_what_was_wrong_with_an_image_is_told_whole(camera: CameraAt) -> None:
    """It was cut before its point, and digits in names were replaced."""
    with pytest.raises(EncodingError) as error:
        check_layout(27, 3, 3, 9, "RGB8")
    camera.accounts.dropped(HEADER, str(error.value))
    message = look(camera)[1]
    assert "unknown encoding 'RGB8' (did you mean 'rgb8'?): expected one of 16UC1, " in message
    assert message.endswith(ENCODINGS[-1])


def test_unusable_images_alone_are_an_error(camera: CameraAt) -> None:
    """No flow will ever come of it."""
    bad_images(camera)
    assert look(camera)[0] == ERROR
    camera.accounts.dropped(HEADER, RATE_LIMITED)
    camera.accounts.first(HEADER, "start")
    assert look(camera)[0] == WARN


@pytest.mark.parametrize(
    ("outcome", "reason", "level", "words"),
    [
        ("dropped", SUPERSEDED, ERROR, ["the worker is not answering", "100 images", "restart the node"]),
        ("first", "gap of 1500 ms, longer than 1000 ms", WARN, ["from the last 10", "gap of 1500", "raise max_gap_ms"]),
        ("first", "time went back by 2.5 ms", WARN, ["time went back", "mend the camera's stamps"]),
        ("first", "frame_id changed from 'a' to 'b'", WARN, ["frame_id changed", "ros2 topic info -v"]),
        ("first", "asked for by ~/reset", WARN, ["asked for by ~/reset", "~/statistics"]),
    ],
    ids=["worker", "gaps", "stamps", "two cameras", "other"],
)
def test_images_without_any_flow_are_not_well(
    camera: CameraAt, outcome: str, reason: str, level: bytes, words: list[str]
) -> None:
    """A node that takes in images and gives out nothing is what these statuses are there for."""
    camera.gives_no_flow(outcome, reason, 0.2)
    assert look(camera)[0] == OK  # a first pair may take its time
    camera.gives_no_flow(outcome, reason, 10.5)
    got, message, _ = look(camera)
    assert got == level and "no flow " in message and all(word in message for word in words), message
    camera.runs(seconds=1.0)
    assert look(camera)[0] == OK
    camera.now_s += 60.0  # silence, and then the first image again
    camera.gives_no_flow(outcome, reason, 0.2)
    assert look(camera)[0] == OK


FLAT_IMAGE = "flat image: nothing to match"


def test_two_cameras_in_turn_and_black_pictures_are_told_at_once_and_so_is_their_end(camera: CameraAt) -> None:
    """For ten seconds all was well by the diagnostics, while nothing or nonsense came out."""
    camera.runs()
    for reason, words in (("frame_id changed from 'a' to 'b'", "two cameras"), (FLAT_IMAGE, "no contrast to compute")):
        camera.gives_no_flow("first", reason, 0.2)
        assert look(camera)[0] == OK  # a flash, a driver that is started anew
        camera.gives_no_flow("first", reason, 0.1)
        level, message, _ = look(camera)
        assert level == WARN and f"no flow from the last 3 images, because: {reason}; " in message and words in message
        camera.runs(seconds=0.1)
        assert look(camera)[0] == OK


def test_breaks_and_flow_of_noise_now_and_then_are_told_where_they_are_often(camera: CameraAt) -> None:
    """A second camera that sends less often leaves flow fields between, and a covered lens gives noise, not black."""
    for _ in range(3):
        assert look(camera)[0] == OK
        camera.runs(seconds=1.0)
        camera.gives_no_flow("first", "frame_id changed from 'a' to 'b'", 0.2)
    level, message, _ = look(camera)
    assert level == WARN and "the stream started anew 6 times in the last 10 s, most because: frame_id" in message
    camera.now_s += 20.0
    camera.runs()
    camera.runs(seconds=0.3, likeness=0.1)
    assert "3 of the last 3 flow fields mean nothing" in look(camera)[1]
    camera.runs(seconds=0.4, repeated=True)
    assert "4 of the last 4 flow fields are zero whatever moves" in look(camera)[1]
    for number in range(120):
        camera.runs(seconds=0.1, repeated=number % 15 == 0)
    assert look(camera)[0] == OK, "H.264 repeats pictures of a scene at rest now and then"


def test_a_worker_that_starts_streams_is_not_said_to_hang(camera: CameraAt) -> None:
    """A slow node whose camera has gaps supersedes images as well; to restart it would help nothing."""
    for _ in range(60):
        camera.gives_no_flow("first", "gap of 1500 ms, longer than 1000 ms", 0.1)
        camera.gives_no_flow("dropped", SUPERSEDED, 0.1)
    level, message, _ = look(camera)
    assert level == WARN and "raise max_gap_ms" in message and "not answering" not in message


def test_images_that_wait_for_their_turn_are_well(camera: CameraAt) -> None:
    """One image in a minute was asked for: none of the others within ten seconds is a fault."""
    camera.gives_no_flow("dropped", RATE_LIMITED, 20.0)
    assert look(camera)[0] == OK


def test_a_reset_is_counted_once_whether_a_pair_follows_or_not(camera: CameraAt) -> None:
    """A stream that starts with every image has no pair to tell of it, and was said never to have started."""
    for number in range(4):
        camera.gives_no_flow("first", f"gap of {2000 + number} ms, longer than 1000 ms", 0.1)
        camera.gives_no_flow("dropped", SUPERSEDED, 0.1)
    assert [look(camera)[2][key] for key in ("resets", "last_reset")] == ["4", "gap of 2003 ms, longer than 1000 ms"]
    camera.runs(seconds=0.1, reset_reason="gap of 2003 ms, longer than 1000 ms")
    assert look(camera)[2]["resets"] == "4"
    camera.runs(seconds=0.1, stop_reason="diverged")
    camera.runs(seconds=0.1, reset_reason="the state was not finite")
    assert [look(camera)[2][key] for key in ("resets", "last_reset")] == ["5", "the state was not finite"]


def test_the_process_has_a_status_through_its_whole_life() -> None:
    """A node that could not be configured is the one that somebody looks for."""
    health = ProcessStatus("robot/flow_node: process")
    process = health.status
    assert (process().name, process().level, process().message) == ("robot/flow_node: process", OK, "not configured")
    health.cleaned_up("configure failed: no weights 'x.pt'")
    assert (process().level, process().message) == (ERROR, "configure failed: no weights 'x.pt'")
    health.configured(torch.device("cpu"), model="nano", threads=1)
    values = {pair.key: pair.value for pair in process().values}
    assert (process().level, process().hardware_id, values["model"], values["threads"]) == (OK, "cpu", "nano", "1")
    assert process().message.startswith("nano on cpu, ")
    assert 20.0 < float(values["rss_mb"]) <= float(values["rss_peak_mb"])
    health.cleaned_up()
    assert process().message == "not configured"
