# SPDX-License-Identifier: Apache-2.0
"""What a stream decides, as a table: from what was seen, what things cost, and the time left. No network is needed."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

from deq_flow_ros import streaming
from deq_flow_ros.streaming.costs import CostModel
from deq_flow_ros.streaming.plan import Deadline, Limits, Moment, Plan, make_plan, scale_ladder

SIZE = 480, 640
LADDER = scale_ladder(SIZE, 0.25)
LONG = (60.0,) * 15


@pytest.fixture(scope="module")
def costs() -> CostModel:
    """Known exactly at full resolution, so that they are in proportion elsewhere (the correlation costs nothing).

    20 ms to encode, 4 to prepare, 6 to upsample, 10 an iteration: at 1, 26 ms without one, 54 when the scale changed.
    """
    costs = CostModel()
    for _ in range(400):
        costs.add(math.prod(SIZE), {"encode": 20.0, "prepare": 4.0, "solve": 10.0, "upsample": 6.0}, 1)
    return costs


@pytest.mark.parametrize(
    ("scale", "ahead", "left_ms", "recent_ms", "expected"),
    [
        (1.0, True, None, (), 1.0),  # without a deadline: the highest
        (0.5, True, None, (), 1.0),
        (1.0, True, 60.0, (60.0,), 1.0),
        (1.0, True, 37.0, (37.0,) * 5, 1.0),  # one fits: it stays
        (1.0, True, 30.0, (60.0,) * 4 + (30.0,), 1.0),  # a frame that came at a bad moment has no iteration
        (1.0, True, 30.0, (30.0,) * 3, 0.75),  # none fits into what is usual: two do there, and a change is in time
        (1.0, True, 28.0, (28.0,), 0.625),  # two take 26 ms at 0.75 as well, but the change to it 28.1 without any
        (1.0, True, 25.0, (60.0,) * 4 + (25.0,), 0.625),  # late without any: one fits there, with the change
        (1.0, True, 1.0, (60.0,) * 4 + (1.0,), 0.25),
        (1.0, True, 29.0, (60.0,) * 4 + (29.0,), 1.0),
        (1.0, False, 29.0, (60.0,) * 4 + (29.0,), 0.625),  # 4 ms more where nothing was prepared ahead
        (0.75, True, 60.0, LONG[1:], 0.75),  # up only after patience
        (0.75, True, 62.0, (62.0,) * 15, 0.875),  # two take 46 ms at 1, but 70 with the change
        (0.75, True, 80.0, (60.0,) * 14 + (80.0,), 1.0),
        (0.75, True, 25.0, (60.0,) * 14 + (25.0,), 0.75),  # the present frame has no time for a larger scale
    ],
)
def test_the_scale_follows_from_costs_and_time(
    costs: CostModel, scale: float, ahead: bool, left_ms: float | None, recent_ms: tuple[float, ...], expected: float
) -> None:
    """Why: the largest scale at which two iterations fit, left when one does not: the rule of docs/budget.md."""
    moment = Moment(SIZE, LADDER, scale, scale, ahead, left_ms, recent_ms)
    assert make_plan(moment, costs).scale == expected


def test_a_plan_says_what_is_to_be_done_besides(costs: CostModel) -> None:
    """Why: a change of scale encodes the last frame once more and makes what was prepared ahead useless."""
    assert make_plan(Moment(SIZE, LADDER, 1.0), costs) == Plan(1.0, SIZE, False, 1.0, False, False)  # a first frame
    assert make_plan(Moment(SIZE, LADDER, 1.0, 1.0, ahead=False), costs).prepare
    moment = Moment(SIZE, LADDER, 1.0, 1.0, True, 1.0, (1.0,))
    assert make_plan(moment, costs) == Plan(0.25, (120, 160), True, 0.25, True, True, moved=True)


def test_a_solve_ends_in_time_for_what_follows_it(costs: CostModel) -> None:
    """Why: 3 % of a budget of 100 ms and the 6 ms of upsampling stay free; and a machine that was slow so far is slow.

    A cold pair, and any at the lowest scale, has one iteration whatever the deadline says.
    """
    plan = Plan(1.0, SIZE, False, 1.0, False, False)
    deadline = Deadline.soonest(5, 100.0, None, 5)
    assert deadline == Deadline(100_000_005, 97_000_005)
    for encode_ms, slower in ((20.0, 1.0), (60.0, 3.0)):
        rest = costs.rest(math.prod(plan.size), {"encode": encode_ms})
        limits = Limits.of(plan, rest, deadline, False, 12, 0.05)
        assert limits.deadline_ns == pytest.approx(97e6 - slower * 6e6, abs=0.2e6)
        assert limits.iteration_ms == pytest.approx(slower * 10.0, rel=0.02) and limits.min_iterations == 0
    lowest = Plan(0.25, (120, 160), False, 1.0, False, True)
    assert Limits.of(plan, rest, None, True, 12, None) == Limits(12, None, None, 1, *rest[1:])
    small = Limits.of(lowest, rest, None, False, 12, 0.05)
    assert (small.min_iterations, small.tolerance) == (1, 0.05 * 0.25)
    both = Limits.common([Limits(12, None, 7, 0, 1.0, 5.0), Limits(12, None, 9, 1, 2.0, 4.0)])
    assert both == Limits(12, None, 7, 1, 2.0, 5.0)


def test_what_decides_knows_no_tensors() -> None:
    """Why: decisions can then be tested without a network, and hold for every engine."""
    folder = Path(streaming.__file__).parent
    for name in ("plan", "costs", "stream", "batch", "continuity", "interface"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert "torch" not in imported, name
