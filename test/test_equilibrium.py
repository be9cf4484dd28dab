# SPDX-License-Identifier: Apache-2.0
"""Fixed points of known problems, the reasons for stopping, and gradients, against closed forms."""

from __future__ import annotations

import time

import pytest
import torch

from deq_flow_ros.equilibrium import (
    Picard,
    StopReason,
    correction_weights,
    phantom_gradient,
    solve,
    sparse_correction,
)


def contraction(dim: int = 6, rate: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (dim, dim) of spectral norm ``rate``, b (3, dim), and the fixed points of z = z A^T + b, in float64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    a = rate * a / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    return a, b, torch.linalg.solve(torch.eye(dim, dtype=torch.float64) - a, b.T).T


def test_picard_finds_the_fixed_point_of_a_linear_map() -> None:
    """Why: the one thing a solver is for. Damped iteration must reach the same point."""
    a, b, expected = contraction()
    for solver in ("picard", Picard(damping=0.7)):
        solution = solve(
            lambda z: (z @ a.T + b,), (torch.zeros_like(b),), solver=solver, max_iterations=100, tolerance=1e-12
        )
        torch.testing.assert_close(solution.state[0], expected, atol=1e-8, rtol=0)
        assert set(solution.stop_reasons) == {StopReason.CONVERGED}
        assert int(solution.iterations.max()) < 100


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

    def slow(z: torch.Tensor) -> tuple[torch.Tensor]:
        time.sleep(0.01)
        return (z + 1,)

    deadline = time.monotonic_ns() + 55_000_000
    solution = solve(slow, (torch.zeros(1, 1),), max_iterations=100, deadline_ns=deadline, iteration_cost_ns=10e6)
    assert time.monotonic_ns() <= deadline
    assert solution.stop_reasons == (StopReason.DEADLINE,) and 1 <= solution.evaluations <= 5


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z0": ()}, "empty tuple"),
        ({"z0": (torch.zeros(2, 1), torch.zeros(3, 1))}, "batch size"),
        ({"f": lambda z: (z[:, :1],)}, r"tensor 0 was \(1, 2\), f returned \(1, 1\)"),
        ({"f": lambda z: (z, z)}, "must return 1 tensors"),
        ({"max_iterations": 0}, "at least 1, got 0"),
        ({"tolerance": -1.0}, "positive or None, got -1"),
        ({"solver": "newton"}, "unknown solver 'newton'"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict, message: str) -> None:
    """Why: an error must say what was expected and what was got."""
    call = {"f": lambda z: (z,), "z0": (torch.zeros(1, 2),), **arguments}
    with pytest.raises(ValueError, match=message):
        solve(call.pop("f"), call.pop("z0"), **call)


def test_phantom_gradient_is_the_truncated_neumann_series() -> None:
    """Why: k steps must give sum_{i<k} (A^T)^i, and approach the implicit gradient (I - A)^-T as k grows."""
    a, b, expected = contraction()
    b.requires_grad_(True)
    eye = torch.eye(a.shape[0], dtype=torch.float64)
    for steps in (1, 3):
        (grad,) = torch.autograd.grad(phantom_gradient(lambda z: (z @ a.T + b,), (expected,), steps)[0].sum(), b)
        series = sum(torch.linalg.matrix_power(a.T, i) for i in range(steps))
        torch.testing.assert_close(grad, (series @ torch.ones(a.shape[0], dtype=torch.float64)).expand_as(b))
    (grad,) = torch.autograd.grad(phantom_gradient(lambda z: (z @ a.T + b,), (expected,), 60)[0].sum(), b)
    implicit = torch.linalg.solve((eye - a).T, torch.ones(a.shape[0], dtype=torch.float64))
    torch.testing.assert_close(grad, implicit.expand_as(b), rtol=1e-8, atol=1e-8)


def test_sparse_correction_returns_the_states_of_one_trajectory() -> None:
    """Why: a correction must be at the iteration it claims, carry a gradient, and not cost further evaluations."""
    weight = torch.tensor(0.5, requires_grad=True)
    calls = []

    def f(z: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(z)
        return (weight * z + 1,)

    states = sparse_correction(f, (torch.zeros(1, 1),), (2, 5), gradient_steps=1)
    plain = solve(lambda z: (0.5 * z + 1,), (torch.zeros(1, 1),), max_iterations=5, keep=(1, 2, 4, 5)).trajectory
    assert len(calls) == 5
    for state, position in zip(states, (2, 5), strict=True):
        assert torch.equal(state[0], plain[position][0])
        (grad,) = torch.autograd.grad(state[0].sum(), weight)
        assert float(grad) == float(plain[position - 1][0])
    assert correction_weights(3, 0.5) == [0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match="leave no room for 2 gradient step"):
        sparse_correction(f, (torch.zeros(1, 1),), (2, 3), gradient_steps=2)
