# SPDX-License-Identifier: Apache-2.0
"""Between iterations: what a host decides that runs ahead of its device, and what is decided without a host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import (
    Anderson,
    Pace,
    Picard,
    Rules,
    Solution,
    Solver,
    StopReason,
    absolute_residual,
    solve,
)


class Behind:
    """A device that is so many pieces of work behind its host, of which the first is of before the solve."""

    def __init__(self, lag: int) -> None:
        self.lag, self.done, self._queued = lag, False, 1

    @property
    def in_flight(self) -> int:
        return min(self.lag, self._queued)

    def push(self, active: Tensor) -> None:
        self._queued += 1

    def look(self, wait: bool) -> None:
        pass


def begun(lag: int, deadline_ms: float, cost_ms: float, timed_after: int | None = None) -> tuple[int, StopReason]:
    """Iterations that a host begins which takes 1 ms for each; the device takes 10."""
    now_ns = 0
    progress = Behind(lag)
    pace = Pace(progress, 100, int(1e6 * deadline_ms), lambda: now_ns, 0, 1e6 * cost_ms, timed_after=timed_after)
    while pace.may_begin():
        progress.push(torch.ones(1, dtype=torch.bool))
        now_ns = int(1e6 * (10 * max(0, pace.begun - lag) + min(pace.begun, lag)))
    return pace.begun, pace.exhausted


def test_what_is_in_flight_counts_against_the_deadline() -> None:
    """Why: a host that runs ahead would else begin iterations which the device ends after it.

    Of 55 ms and 10 each, 5 end in time if the host knows all, and 4 behind work of before, which counts as one.
    """
    assert begun(0, 55, 10) == (5, StopReason.DEADLINE)
    assert begun(1, 55, 10) == (5, StopReason.DEADLINE)
    assert begun(2, 55, 10) == (5, StopReason.DEADLINE)
    assert begun(1, 15, 10) == (0, StopReason.DEADLINE), "work of before, and an iteration, end after 20 ms"


def test_without_an_expectation_a_host_that_runs_ahead_divides_by_what_has_ended() -> None:
    """Why: divided by what it has queued, an iteration would look as cheap as queueing it."""
    count, reason = begun(2, 55, 0, timed_after=2)
    assert reason == StopReason.DEADLINE and count <= 6


def test_a_start_that_is_not_finite_is_named_when_the_solution_is_read() -> None:
    """Why: a GPU's host must not wait at the end of a solve, and yet nobody must take NaN for an answer."""
    figures = torch.tensor([[0.0, torch.inf, 0.0, 1.0], [3.0, 0.1, 1.0, 0.0]])
    before = Rules(None, keeps_best=False, look=True).begin((torch.zeros(2, 1),))
    solution = Solution(before, 3, check_start=True)
    with pytest.raises(FloatingPointError, match=r"infinity for sample\(s\) \[0\] of 2"):
        solution.samples(figures.tolist())
    assert [made for made, _, _ in solution.samples(figures[1:].tolist())] == [3]


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_a_solve_that_is_not_watched_gives_the_same(solver: Solver) -> None:
    """Why: what is captured in a graph cannot look at its samples; they must stop all the same."""
    rates = torch.tensor([[0.1], [0.9], [4.0]], dtype=torch.float64)

    def f(z: Tensor) -> tuple[Tensor]:
        return (rates * z + 1,)

    settings = {"max_iterations": 30, "tolerance": 1e-3, "measure": absolute_residual, "solver": solver}
    start = (torch.ones(3, 1, dtype=torch.float64),)
    seen, unseen = solve(f, start, **settings), solve(f, start, **settings, watch=False)
    assert unseen.evaluations == 30 and seen.stop_reasons == unseen.stop_reasons
    assert torch.equal(seen.state[0], unseen.state[0]) and torch.equal(seen.iterations, unseen.iterations)
