# SPDX-License-Identifier: Apache-2.0
"""The books of a solve: who stopped when and why, and which state is the answer."""

from __future__ import annotations

import time

import pytest
import torch

from deq_flow_ros.equilibrium import StopReason, absolute_residual, relative_residual, solve


def test_samples_stop_for_themselves() -> None:
    """Why: an easy sample must not be iterated, and counted, until the hardest of its batch has settled."""
    rates = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    solution = solve(
        lambda z: (rates * z + 1,), (torch.zeros(2, 1, dtype=torch.float64),), max_iterations=15, tolerance=1e-6
    )
    assert solution.stop_reasons == (StopReason.CONVERGED, StopReason.ITERATIONS)
    assert int(solution.iterations[0]) < int(solution.iterations[1]) == 15
    alone = solve(
        lambda z: (0.1 * z + 1,), (torch.zeros(1, 1, dtype=torch.float64),), max_iterations=15, tolerance=1e-6
    )
    assert torch.equal(solution.state[0][:1], alone.state[0])


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_a_small_cap_means_so_many_evaluations(cap: int) -> None:
    """Why: robots run on one to three iterations; each must count, and be the state that is returned."""
    solution = solve(lambda z: (z + 1,), (torch.zeros(1, 1),), max_iterations=cap, keep=(1, cap))
    assert float(solution.state[0]) == cap == solution.evaluations == int(solution.iterations)
    assert float(solution.trajectory[cap][0]) == cap and float(solution.trajectory[1][0]) == 1
    assert float(solution.previous[0]) == cap - 1


def test_a_deadline_is_not_overrun() -> None:
    """Why: the solver stops before an iteration that would end too late, not after it."""
    now_ns = 0

    def slow(z: torch.Tensor) -> tuple[torch.Tensor]:
        nonlocal now_ns
        now_ns += 10_000_000
        return (z + 1,)

    limits = {"max_iterations": 100, "deadline_ns": 55_000_000, "iteration_cost_ns": 10e6}
    solution = solve(slow, (torch.zeros(1, 1),), **limits, now_ns=lambda: now_ns)
    assert 40_000_000 <= now_ns <= limits["deadline_ns"]
    assert solution.stop_reasons == (StopReason.DEADLINE,)


def test_without_an_expectation_the_first_iteration_is_the_measure() -> None:
    """Why: a second iteration as long as the first would end after the deadline; nothing else is known of it."""

    def slow(z: torch.Tensor) -> tuple[torch.Tensor]:
        time.sleep(0.1)
        return (z + 1,)

    solution = solve(slow, (torch.zeros(1, 1),), deadline_ns=time.monotonic_ns() + 150_000_000)
    assert solution.evaluations == 1 and solution.stop_reasons == (StopReason.DEADLINE,)


def test_no_time_at_all_returns_the_start() -> None:
    """Why: a warm start is a usable answer; an iteration begun after the deadline is not."""
    start = torch.ones(1, 2)
    solution = solve(lambda z: (z + 1,), (start,), deadline_ns=time.monotonic_ns() - 1)
    assert torch.equal(solution.state[0], start) and solution.evaluations == 0
    assert solution.stop_reasons == (StopReason.DEADLINE,)


def test_a_sample_that_diverges_keeps_its_last_finite_state() -> None:
    """Why: one bad sample must neither spoil the batch nor hand NaN on."""

    def f(z: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.where(z > 2, torch.nan, z + 1) * torch.tensor([[1.0], [0.0]]) + torch.tensor([[0.0], [3.0]]),)

    def second_is_fine(z: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cat((f(z)[0][:1], 0.5 * z[1:] + 1)),)

    solution = solve(second_is_fine, (torch.zeros(2, 1),), max_iterations=60, tolerance=1e-4)
    assert solution.stop_reasons == (StopReason.DIVERGED, StopReason.CONVERGED)
    assert float(solution.state[0][0]) == 3.0 and float(solution.state[0][1]) == pytest.approx(2.0, abs=1e-3)


def test_growth_is_divergence_long_before_infinity() -> None:
    """Why: a state a million times too long is no flow; stop there, and hand back one from before."""
    factors = torch.tensor([[2.0], [0.5]], dtype=torch.float64)
    start = torch.ones(2, 1, dtype=torch.float64)
    solution = solve(lambda z: (factors * z,), (start,), max_iterations=100)
    assert solution.stop_reasons == (StopReason.DIVERGED, StopReason.ITERATIONS)
    assert int(solution.iterations[0]) == 20 and float(solution.state[0][0]) == 2.0**20


class Detour:
    """A solver that evaluates given points: near the fixed point 0 first, then farther away."""

    keeps_best = True

    def __init__(self, points: tuple[float, ...]) -> None:
        self.points = points

    def start(self):
        points = iter(self.points)
        return lambda z, fz: (torch.full_like(z[0], next(points)),)


def test_the_best_state_is_kept_where_the_residual_rises() -> None:
    """Why: an accelerated solve may be cut off by its deadline at a bad moment."""
    problem = (lambda z: (0.5 * z,), (torch.full((1, 1), 8.0),))
    settings = {"solver": Detour((2.0, 6.0, 4.0)), "max_iterations": 4, "measure": absolute_residual, "keep": (3,)}
    best = solve(*problem, **settings)
    assert float(best.state[0]) == 1.0 and float(best.previous[0]) == 2.0 and float(best.residual) == 1.0
    assert int(best.iterations) == 4
    assert float(best.trajectory[3][0]) == 3.0, "the trajectory is what was iterated, not what was best"


def test_the_trace_holds_the_measure_of_every_iteration() -> None:
    """Why: convergence is judged, and plotted, by it; a sample that has stopped has no further residual."""
    rates = torch.tensor([[0.5], [0.9]])
    solution = solve(
        lambda z: (rates * z,), (torch.ones(2, 1),), max_iterations=6, tolerance=0.05, measure=absolute_residual
    )
    torch.testing.assert_close(solution.trace[:, 1], 0.1 * 0.9 ** torch.arange(6.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(solution.trace[:5, 0], 0.5 ** torch.arange(1.0, 6.0))
    assert solution.trace[5:, 0].isnan().all()
    assert relative_residual((torch.ones(1, 2),), (2 * torch.ones(1, 2),)).item() == 0.5


def test_a_solve_under_gradients_is_attached() -> None:
    """Why: solve runs in the caller's gradient mode; freezing a sample must not cut the others' graph."""
    weight = torch.tensor([[0.5], [0.1]], requires_grad=True)
    solution = solve(lambda z: (weight * z + 1,), (torch.zeros(2, 1),), max_iterations=8, tolerance=1e-3)
    (grad,) = torch.autograd.grad(solution.state[0].sum(), weight)
    assert (grad > 1).all() and int(solution.iterations[1]) < int(solution.iterations[0])


def test_a_start_where_f_is_not_finite_is_an_error_unless_asked_otherwise() -> None:
    """Why: NaN from the first evaluation is a mistake of the caller's; a stream would rather be told than stopped."""
    nan = torch.tensor([[1.0], [torch.nan]])
    with pytest.raises(FloatingPointError, match=r"expected f\(z0\) to be finite.* sample\(s\) \[1\] of 2"):
        solve(lambda z: (0.5 * z + nan,), (torch.zeros(2, 1),))
    solution = solve(lambda z: (0.5 * z + nan,), (torch.zeros(2, 1),), check_start=False)
    assert solution.stop_reasons == (StopReason.ITERATIONS, StopReason.DIVERGED)
    assert float(solution.state[0][1]) == 0.0 and int(solution.iterations[1]) == 0
    infinite = (torch.zeros(1, 1), torch.full((1, 1), torch.inf))
    with pytest.raises(FloatingPointError):  # also in a tensor that the measure does not look at
        solve(lambda u, v: (0.5 * u, v), infinite, measure=lambda z, fz: (fz[0] - z[0]).abs().flatten())


def test_half_precision_is_measured_in_single() -> None:
    """Why: squares of ordinary numbers leave its range, above and below: false divergence, false convergence."""
    for slope, constant in ((0.5, 200.0), (0.9, 1e-4)):
        solution = solve(
            lambda z, a=slope, b=constant: (a * z + b,),
            (torch.zeros(1, 1, dtype=torch.float16),),
            max_iterations=120,
            tolerance=1e-3,
        )
        assert solution.stop_reasons == (StopReason.CONVERGED,)
        assert float(solution.state[0]) == pytest.approx(constant / (1 - slope), rel=0.05)


def test_a_diverging_neighbour_spoils_neither_state_nor_gradient() -> None:
    """Why: samples of a batch have nothing to do with each other."""
    weight = torch.tensor([[0.5], [3.0]], dtype=torch.float64, requires_grad=True)
    start = torch.ones(2, 1, dtype=torch.float64)
    solution = solve(lambda z: (weight * z + 1 / (z < 1e6),), (start,), max_iterations=60)
    assert solution.stop_reasons[1] == StopReason.DIVERGED
    (gradient,) = torch.autograd.grad(solution.state[0][0].sum(), weight)
    assert float(gradient[0]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z0": ()}, "empty tuple"),
        ({"z0": torch.zeros(1, 2)}, r"\(z,\) for a single one; got Tensor"),
        ({"z0": (torch.zeros(1, 2).long(),)}, "real floating-point type; tensor 0 is .*int64"),
        ({"f": lambda z: None}, "tensor 0 was .*, f returned NoneType"),
        ({"f": lambda z: (z.double(),)}, r"was .*torch\.float32 on cpu, f returned .*torch\.float64"),
        ({"f": lambda z: (z.add_(1),)}, "changed tensor 0 of its input in place"),
        ({"measure": lambda z, fz: (fz[0] - z[0]).abs()}, r"must return shape \(1,\), got \(1, 2\)"),
        ({"min_iterations": 13}, "from 0 to max_iterations, 12, got 13"),
        ({"keep": (0, 3)}, r"from 1 to max_iterations, 12, got \[0\]"),
        ({"z0": (torch.zeros(2, 1), torch.zeros(3, 1))}, "batch size"),
        ({"f": lambda z: (z[:, :1],)}, r"tensor 0 was \(1, 2\), .*f returned \(1, 1\)"),
        ({"f": lambda z: (z, z)}, "must return 1 tensors"),
        ({"max_iterations": 0}, "at least 1, got 0"),
        ({"tolerance": -1.0}, "positive or None, got -1"),
        ({"solver": "newton"}, "unknown solver 'newton'"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict, message: str) -> None:
    """Why: an error must say what was expected and what was got."""
    call = {"f": lambda z: (z,), "z0": (torch.zeros(1, 2),), **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        solve(call.pop("f"), call.pop("z0"), **call)
