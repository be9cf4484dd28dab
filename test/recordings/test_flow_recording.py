# SPDX-License-Identifier: Apache-2.0
"""The account of every frame must notice what is wrong."""

import re

import pytest

from deq_flow_ros.recordings.flow_bag import FrameReport, take_account

STEP_NS = 100_000_000


def report(number: int, outcome: str = "processed", previous: int | None = None, **more: str) -> FrameReport:
    stamps = {"image1_stamp_ns": "", "image2_stamp_ns": str(number * STEP_NS)}
    if outcome == "processed":
        stamps["image1_stamp_ns"] = str((number - 1 if previous is None else previous) * STEP_NS)
    reason = {"first": "start", "dropped": "superseded by a newer frame"}.get(outcome, "")
    return FrameReport(
        number * STEP_NS, {"outcome": outcome, "reason": reason, "direction": "forward", **stamps, **more}
    )


def stamps(*numbers: int) -> list[int]:
    return [number * STEP_NS for number in numbers]


def test_a_complete_run_has_no_problems() -> None:
    """First, processed and dropped frames are all that was published; flow carries the previous image's stamp."""
    reports = [report(1, "first"), report(2), report(3, "dropped"), report(4, previous=2)]
    account = take_account(stamps(1, 2, 3, 4), reports, stamps(1, 2))
    assert account.problems == []
    assert account.outcomes == {"processed": 2, "first": 1, "dropped": 1}
    assert account.drop_reasons == {"superseded by a newer frame": 1}


@pytest.mark.parametrize(
    ("published", "reports", "flow", "problem"),
    [
        ((1, 2, 3), [report(1, "first"), report(2)], (1,), "1 frames published, but no report says"),
        ((1, 2), [report(1, "first"), report(2), report(2, "dropped")], (1,), "1 frames reported, but never published"),
        ((1, 2), [report(1, "first"), report(2)], (), "1 frames processed, but their flow was not recorded"),
        ((1, 2), [report(1, "first"), report(2)], (2,), "flow messages whose stamp is not that of"),
        ((1, 2), [report(1, "first"), report(2, "dropped", reason="")], (), "1 frames were dropped without a reason"),
        ((1,), [report(1, "lost")], (), r"expected the outcomes processed, first and dropped, got \['lost'\]"),
    ],
)
def test_whatever_does_not_add_up_is_named(
    published: tuple[int, ...], reports: list[FrameReport], flow: tuple[int, ...], problem: str
) -> None:
    """A frame that vanishes, appears twice, or whose flow is missing or wrongly stamped, must each be noticed."""
    account = take_account(stamps(*published), reports, stamps(*flow))
    assert any(re.search(problem, line) for line in account.problems), account.problems


def test_backward_flow_carries_the_current_stamp() -> None:
    """The header rule turns around with the direction."""
    backward = report(2, direction="backward")
    assert backward.flow_stamp_ns == 2 * STEP_NS and report(2).flow_stamp_ns == STEP_NS
    assert take_account(stamps(1, 2), [report(1, "first"), backward], stamps(2)).problems == []
