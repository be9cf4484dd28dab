# SPDX-License-Identifier: Apache-2.0
"""The account of every frame: what it says, what is kept of it, and what that costs."""

import threading
import time
import tracemalloc

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from frame_accounts import HEADER, CameraAt, info

from deq_flow_ros.ros.accounts import MAX_REASON, SUPERSEDED, FrameAccounts, kind_of
from deq_flow_ros.ros.health import MOST_KINDS, camera_status, figures


@pytest.fixture
def camera() -> CameraAt:
    return CameraAt()


def test_reasons_are_grouped_and_never_grow_without_bound(camera: CameraAt) -> None:
    """A hostile camera must not fill the memory with words of its own."""
    assert kind_of("step at least 192, got 100") == kind_of("step at least 24, got 2.5")
    assert kind_of("got 'jpeg'") == kind_of("got 'x 1'") != kind_of("missing 'x'")
    for number in range(2000):
        letters = "".join(chr(97 + int(digit)) for digit in str(number))
        camera.accounts.dropped(HEADER, f"a reason of its own: {letters}{'!' * 500}")
    told = figures(camera.accounts.window())
    kinds = [key for key in told if key.startswith("dropped: ")]
    assert len(kinds) == MOST_KINDS and told["dropped"] == "2000" and max(map(len, kinds)) < 100
    camera.accounts.first(HEADER, f"frame_id changed from 'a' to '{'b' * 100_000}'")
    assert len(camera.accounts.window().resets[-1]) == MAX_REASON


def test_memory_is_that_of_one_window(camera: CameraAt) -> None:
    """The node runs for weeks."""
    tracemalloc.start()
    try:
        camera.runs(seconds=20.0)
        before = tracemalloc.get_traced_memory()[0]
        camera.runs(seconds=60.0)
        assert tracemalloc.get_traced_memory()[0] < 1.1 * before
    finally:
        tracemalloc.stop()
    assert len(camera.accounts.window().samples) <= 101


def test_frames_may_come_while_a_status_is_made() -> None:
    """The worker counts while the executor reports; no frame may get lost between them."""
    accounts = FrameAccounts("cpu", "forward", clock=lambda: 1.0)

    def frames() -> None:
        for _ in range(500):
            accounts.arrivals.append((1.0, 0))
            accounts.processed(HEADER, info(), {})

    threads = [threading.Thread(target=frames) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        camera_status("front", "/camera/image", accounts.window())
    assert accounts.window().received == len(accounts.window().infos) == 1000


def test_an_account_costs_next_to_nothing() -> None:
    """Measuring must not be what makes it slow; typically 0.1 ms with its message, the bound is for a busy machine."""
    accounts, one = FrameAccounts("cpu", "forward"), info()
    costs = []
    for _ in range(20):
        started = time.thread_time()
        for _ in range(20):
            accounts.arrivals.append((time.monotonic(), 0))
            accounts.processed(HEADER, one, {}, 1.0)
        costs.append((time.thread_time() - started) / 20)
    assert min(costs) < 1e-3


def test_accounts_are_counted_and_name_camera_and_age() -> None:
    """Whoever records `~/statistics` alone must know which camera it was and how old its images were."""
    accounts = FrameAccounts("cpu", "forward", "front")
    for _ in range(3):
        accounts.arrivals.append((time.monotonic(), 1))
    sent = [
        accounts.first(HEADER, "start", 4.0),
        accounts.processed(HEADER, info(direction="backward"), {"publish": 1.0}, 5.0),
        accounts.dropped(HEADER, SUPERSEDED),
    ]
    values = [{pair.key: pair.value for pair in message.status[0].values} for message in sent]
    assert [value["camera"] for value in values] == ["front"] * 3
    assert [value["age_ms"] for value in values] == ["4.000", "5.000", ""]
    assert [value["direction"] for value in values] == ["forward", "backward", "forward"]
    counted = {key: value for key, value in values[-1].items() if key.startswith("frames_")}
    assert counted == {
        "frames_received": "3", "frames_processed": "1", "frames_first": "1", "frames_dropped": "1", "frames_lost": "3",
    }  # fmt: skip
    assert {message.status[0].name for message in sent} == {"deq_flow_ros: flow front"}
    window = accounts.window()
    assert (window.received, window.lost, len(window.infos), window.drops) == (3, 3, 1, {SUPERSEDED: 1})
    assert window.stage_means == {"encode": 10.0, "solve": 40.0, "publish": 1.0}


@pytest.mark.parametrize("ages_ms", [[*[30.0] * 11, 2e12], [2e12, *[30.0] * 11], [*[30.0] * 6, *[-20e3] * 6]])
def test_one_odd_stamp_or_a_clock_that_is_set_is_no_other_unit(camera: CameraAt, ages_ms: list[float]) -> None:
    """An image without a stamp, or NTP that sets the clock by 20 s, once; units differ all the time."""
    for age_ms in ages_ms:
        camera.runs(seconds=1.0 if age_ms != 2e12 else 0.1, age_ms=age_ms)
    assert camera.accounts.window().drift == 0.0
