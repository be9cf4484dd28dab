# SPDX-License-Identifier: Apache-2.0
"""Stamps as drivers send them: what does not fit is left out, so that the stream goes on."""

import pytest

from deq_flow_ros.imaging import Pace, longest_gap_ms
from deq_flow_ros.streaming.continuity import FAR_NS, StampOrder, why_anew

SECOND = 10**9
DAYS = 2 * FAR_NS


@pytest.mark.parametrize(
    ("stamps", "taken"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 1, 2, 2, 3, 3], [1, 2, 3]),  # each message twice
        ([10, 11, 9, 12, 13], [10, 11, 12, 13]),  # one was late
        ([10, 11, 0, 12, 0, 13], [10, 11, 12, 13]),  # some have no stamp
        ([10, 11, 12, 5, 6, 7], [10, 11, 12, 6, 7]),  # the clock was set back, or a recording starts over
        ([DAYS, DAYS + 1, 0, DAYS - 9, DAYS + 2], [DAYS, DAYS + 1, DAYS + 2]),  # one without a stamp, one late
        ([0, 0, 0], [0]),  # a driver that never stamps
        ([10, 11, 8, 11, 9, 12], [10, 11, 12]),  # late and repeated
        ([10, 11, 2**31 * SECOND, 12, 13], [10, 11, 12, 13]),  # garbage
        ([10, 11, DAYS, DAYS, 12, DAYS + 5, 13], [10, 11, 12, 13]),  # garbage again and again
        ([10, 11, DAYS, 0, 12, 13], [10, 11, 12, 13]),
        ([10, 11, DAYS, DAYS + 1, DAYS + 2], [10, 11, DAYS + 1, DAYS + 2]),  # the clock was set, and stays
        ([10, DAYS, 2 * DAYS, 3 * DAYS, 4 * DAYS], [10, 2 * DAYS, 3 * DAYS, 4 * DAYS]),  # one image every other day
    ],
)
def test_one_frame_out_of_order_is_left_out_and_two_are_a_clock_that_was_set(
    stamps: list[int], taken: list[int]
) -> None:
    """Why: a message that arrives twice or late made every pair a cold one."""
    order = StampOrder()
    reasons = [(stamp, order.why_out(stamp)) for stamp in stamps]
    assert [stamp for stamp, reason in reasons if reason is None] == taken
    assert all(reason.endswith("left out") for _, reason in reasons if reason is not None)


@pytest.mark.parametrize(("period_ms", "gap_ms"), [(33, 1000), (500, 1500), (2000, 6000), (1e12, 180_000)])
def test_a_gap_is_judged_by_the_rate_of_the_stream(period_ms: float, gap_ms: float) -> None:
    """Why: of a recording with one frame a second, jitter made a gap of every other pair."""
    assert longest_gap_ms(1000.0, period_ms * 1e6) == gap_ms


def test_a_frame_that_is_early_by_the_time_that_passed_is_left_out_and_one_behind_a_pause_is_not() -> None:
    """Why: a stamp of an hour later began the stream anew twice, and a camera that pauses for an hour is no fault."""
    order = StampOrder()
    assert order.why_out(0, SECOND) is None
    assert order.why_out(3600 * SECOND, SECOND) == "stamped 3600.0 s later than the frame before: left out"
    assert order.why_out(SECOND // 30, SECOND) is order.why_out(3600 * SECOND, 3600 * SECOND) is None
    assert why_anew(0, 3600 * SECOND) is None  # a gap like others
    assert why_anew(0, DAYS) == "time went on by 172800.0 s"


@pytest.mark.parametrize(
    ("times_s", "due_s", "skipped"),
    [
        ([0, 0.1, 0.2], [0, 0.1, 0.1], 0),
        ([5, 5.1, 1.7e9, 1.7e9 + 0.1], [0, 0.1, 0.1, 0.1], 1),  # from 1970 to now
        ([0, 0.1, 3600.1, 3600.2], [0, 0.1, 0.1, 0.1], 1),
        ([3600, 3600.1, 0, 0.1], [0, 0.1, 0.1, 0.1], 1),
        ([0, 4, 8], [0, 4, 4], 0),
        ([7, 7, 7], [0, 0, 0], 0),
    ],
)
def test_a_replay_skips_what_no_frame_was_recorded_in(times_s: list[float], due_s: list[float], skipped: int) -> None:
    """Why: a replay waited decades for a recording that began before the robot knew the time."""
    pace = Pace(SECOND // 10)
    steps = [pace.step(round(time * SECOND)) for time in times_s]
    assert [step / SECOND for step, _ in steps] == pytest.approx(due_s, abs=1e-6)
    assert sum(note is not None for _, note in steps) == skipped


def test_how_long_a_pause_may_be_is_a_parameter() -> None:
    """Why: a pause may be what somebody wants to see, and frames 10 s apart are a stream as well."""
    hour = [Pace(SECOND, 0.0), Pace(SECOND, 4000.0), Pace(10 * SECOND)]
    assert [pace.step(0)[0] for pace in hour] == [0, 0, 0]
    assert [pace.step(time * SECOND)[0] for pace, time in zip(hour, (3600, 3600, 10), strict=True)] == [
        3600 * SECOND, 3600 * SECOND, 10 * SECOND,
    ]  # fmt: skip
