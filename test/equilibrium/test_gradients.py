# SPDX-License-Identifier: Apache-2.0
"""Gradients through fixed points against unrolling, closed forms and finite differences; corrections on the way."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import saved_bytes
from deq_flow_ros.equilibrium import (
    Anderson,
    Solution,
    StopReason,
    absolute_residual,
    correction_weights,
    implicit_gradient,
    phantom_gradient,
    solve,
    sparse_correction,
    uniform_positions,
    unroll,
)
from deq_flow_ros.equilibrium.state import Function, State


def contraction(dim: int = 6, rate: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """A (dim, dim) of spectral norm ``rate``, b (3, dim), and the fixed points of z = z A^T + b, in float64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    a = rate * a / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    return a, b, torch.linalg.solve(torch.eye(dim, dtype=torch.float64) - a, b.T).T


def two_tensors(weight: Tensor, bias: Tensor, u: Tensor, v: Tensor) -> State:
    """A small network on a state of two tensors that depend on each other."""
    z = torch.tanh(torch.cat((u.flatten(1), v), 1) @ weight.T + bias)
    return z[:, :6].reshape(-1, 2, 3), z[:, 6:]


class TwoTensors(nn.Module):
    """``two_tensors`` with parameters and an input."""

    def __init__(self, rate: float = 0.8) -> None:
        super().__init__()
        a, _, _ = contraction(8, rate)
        self.weight = nn.Parameter(a)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64))

    def problem(self, x: Tensor) -> Function:
        return partial(two_tensors, self.weight, self.bias + x)

    @staticmethod
    def start(batch: int) -> State:
        zeros = torch.zeros(batch, 8, dtype=torch.float64)
        return zeros[:, :6].reshape(-1, 2, 3), zeros[:, 6:]


def loss_of(state: State) -> Tensor:
    return (state[0].square().sum((1, 2)) + (state[1] * torch.arange(1, 3, dtype=torch.float64)).sum(1)).sum()


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_implicit_gradient_equals_a_converged_unrolling(solver: str) -> None:
    """Why: it is the true gradient of the fixed point, for parameters and inputs, by every solver of the adjoint."""
    model = TwoTensors()
    x = torch.linspace(-0.5, 0.5, 24, dtype=torch.float64).view(3, 8).requires_grad_()
    leaves = [*model.parameters(), x]
    expected = torch.autograd.grad(loss_of(unroll(model.problem(x), model.start(3), 200)[-1]), leaves)
    with torch.no_grad():
        found = solve(model.problem(x), model.start(3), solver="anderson", max_iterations=80, tolerance=1e-13).state
    state = implicit_gradient(model.problem(x), found, solver=solver, max_iterations=150, tolerance=1e-12)
    torch.testing.assert_close(state, found)
    for got, true in zip(torch.autograd.grad(loss_of(state), leaves), expected, strict=True):
        assert float((got - true).norm() / true.norm()) < 1e-9


def test_implicit_gradient_passes_gradcheck() -> None:
    """Why: finite differences know nothing of how the gradient was derived."""
    model = TwoTensors()

    def fixed_point(weight: Tensor, x: Tensor) -> State:
        f = partial(two_tensors, weight, model.bias.detach() + x)
        with torch.no_grad():
            found = solve(f, model.start(2), solver="anderson", max_iterations=80, tolerance=1e-13).state
        return implicit_gradient(f, found, max_iterations=80, tolerance=1e-12)

    x = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64).view(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(fixed_point, (model.weight.detach().clone().requires_grad_(), x))


def test_implicit_gradient_leaves_the_state_alone_and_reports_its_solve() -> None:
    """Why: one evaluation under autograd, no gradient into how the state was found, and its cost visible."""
    a, b, expected = contraction()
    weight = a.clone().requires_grad_()
    calls, reports = [], []

    def f(z: Tensor) -> tuple[Tensor]:
        calls.append(z)
        return (z @ weight.T + b,)

    start = expected.clone().requires_grad_()
    state = implicit_gradient(f, (start,), solver=Anderson(window=8), tolerance=1e-10, report=reports.append)
    state[0].sum().backward()
    assert len(calls) == 1 and start.grad is None and weight.grad is not None
    (solution,) = reports
    assert isinstance(solution, Solution) and set(solution.stop_reasons) == {StopReason.CONVERGED}


def test_an_adjoint_equation_that_is_not_solved_is_warned_of() -> None:
    """Why: a silent wrong gradient would spoil a training: where f expands, or the iterations do not suffice."""
    for factor, message in ((3.0, r"1 of 1 samples \(1 diverged\)"), (0.999, r"1 of 1 samples \(0 diverged\)")):
        weight = torch.tensor(factor, requires_grad=True)
        state = implicit_gradient(lambda z, w=weight: (w * z,), (torch.zeros(1, 1),), solver="picard")
        with pytest.warns(RuntimeWarning, match=message):
            state[0].sum().backward()


def test_constant_parts_and_states_of_inference_can_be_differentiated() -> None:
    """Why: predictions come from inference mode, and a part of a state may not depend on the state."""
    weight = torch.tensor(0.5, requires_grad=True)
    with torch.inference_mode():
        found = solve(lambda u, v: (weight * u + v, v), (torch.zeros(1, 1), torch.ones(1, 1)), max_iterations=40).state
    state = implicit_gradient(lambda u, v: (weight * u + 1, torch.ones(1, 1)), found)
    (gradient,) = torch.autograd.grad(state[0].sum(), weight)
    assert float(gradient) == pytest.approx(4.0, rel=1e-4)  # d/dw 1 / (1 - w)


def test_gradients_equal_those_of_torchdeq() -> None:
    """Why: an independent implementation of the implicit and the phantom gradient."""
    torchdeq = pytest.importorskip("torchdeq", reason="torchdeq is not installed")
    a, b, _ = contraction(12, 0.9)
    weight = a.clone().requires_grad_()

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + b)

    start = torch.zeros_like(b)
    with torch.no_grad():
        found = solve(lambda z: (f(z),), (start,), solver="anderson", max_iterations=80, tolerance=1e-13).state
    settings = {"f_max_iter": 80, "f_tol": 1e-13, "b_max_iter": 80, "b_tol": 1e-12, "b_solver": "anderson"}
    for theirs, ours in (
        ({"ift": True}, partial(implicit_gradient, max_iterations=80, tolerance=1e-12)),
        ({"grad": 1}, phantom_gradient),
        ({"grad": 3, "tau": 0.6}, partial(phantom_gradient, steps=3, damping=0.6)),
    ):
        deq = torchdeq.get_deq(f_solver="anderson", f_stop_mode="rel", b_stop_mode="rel", **settings, **theirs).double()
        (expected,) = torch.autograd.grad(deq(f, start)[0][-1].square().sum(), weight)
        (got,) = torch.autograd.grad(ours(lambda z: (f(z),), found)[0].square().sum(), weight)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_phantom_gradient_is_the_truncated_neumann_series() -> None:
    """Why: k steps must give sum_{i<k} (A^T)^i, damped ones their own series, and approach (I - A)^-T as k grows."""
    a, b, expected = contraction()
    b.requires_grad_(True)
    eye = torch.eye(a.shape[0], dtype=torch.float64)
    ones = torch.ones(a.shape[0], dtype=torch.float64)

    def f(z: Tensor) -> tuple[Tensor]:
        return (z @ a.T + b,)

    for steps, damping in ((1, 1.0), (3, 1.0), (3, 0.5)):
        (grad,) = torch.autograd.grad(phantom_gradient(f, (expected,), steps, damping)[0].sum(), b)
        damped = (1 - damping) * eye + damping * a.T
        series = damping * sum(torch.linalg.matrix_power(damped, i) for i in range(steps))
        torch.testing.assert_close(grad, (series @ ones).expand_as(b))
    (grad,) = torch.autograd.grad(phantom_gradient(f, (expected,), 60)[0].sum(), b)
    torch.testing.assert_close(grad, torch.linalg.solve((eye - a).T, ones).expand_as(b), rtol=1e-8, atol=1e-8)


def test_memory_does_not_grow_with_the_iterations() -> None:
    """Why: the reason for equilibrium models. The recurrent counterpart must grow, or the measure is blind."""
    model = TwoTensors()
    x = torch.zeros(64, 8, dtype=torch.float64)
    for gradient in (phantom_gradient, partial(phantom_gradient, steps=3), implicit_gradient):
        for chained in (True, False):
            correct = partial(sparse_correction, gradient=gradient, gradient_steps=3, chained=chained)
            few, many = (
                saved_bytes(model, partial(correct, model.problem(x), model.start(64), (n // 2, n)))[1]
                for n in (12, 48)
            )
            assert few == many > 0
    few, many = (saved_bytes(model, partial(unroll, model.problem(x), model.start(64), n))[1] for n in (12, 48))
    assert many > 3.5 * few


def test_a_chain_is_one_trajectory_at_no_further_cost() -> None:
    """Why: a correction must be at the iteration it claims, carry a gradient, and not cost further evaluations."""
    weight = torch.tensor(0.5, requires_grad=True)
    calls = []

    def f(z: Tensor) -> tuple[Tensor]:
        calls.append(z)
        return (weight * z + 1,)

    states = sparse_correction(f, (torch.zeros(1, 1),), (2, 5))
    plain = solve(lambda z: (0.5 * z + 1,), (torch.zeros(1, 1),), max_iterations=5, keep=(1, 2, 4, 5)).trajectory
    assert len(calls) == 5
    for state, position in zip(states, (2, 5), strict=True):
        assert torch.equal(state[0], plain[position][0])
        (grad,) = torch.autograd.grad(state[0].sum(), weight)
        assert float(grad) == float(plain[position - 1][0])
    assert correction_weights(3, 0.5) == [0.25, 0.5, 1.0]


def test_states_of_one_trajectory_keep_the_history_of_the_solver() -> None:
    """Why: the other way of the paper: an accelerated solve must not be cut at every correction."""
    a, b, _ = contraction(24, 0.95)
    start = torch.zeros_like(b)

    def f(z: Tensor) -> tuple[Tensor]:
        return (torch.tanh(z @ a.T + b),)

    states = sparse_correction(f, (start,), (4, 8), solver="anderson", chained=False)
    whole = solve(f, (start,), solver="anderson", max_iterations=8, keep=(4, 8)).trajectory
    for state, position in zip(states, (4, 8), strict=True):
        torch.testing.assert_close(state[0], f(whole[position][0])[0])
    chain = sparse_correction(f, (start,), (4, 8), solver="anderson")
    assert (absolute_residual(states[1], f(states[1][0])) < absolute_residual(chain[1], f(chain[1][0]))).all()


def test_each_correction_has_its_own_gradient() -> None:
    """Why: the paper mixes gradients along the way: cheap ones early, a better one at the end."""
    a, b, expected = contraction()
    b.requires_grad_(True)
    ones = torch.ones(a.shape[0], dtype=torch.float64)

    def f(z: Tensor) -> tuple[Tensor]:
        return (z @ a.T + b,)

    gradients = (phantom_gradient, partial(phantom_gradient, steps=2), partial(implicit_gradient, tolerance=1e-12))
    for chained in (True, False):
        states = sparse_correction(
            f, (expected,), (3, 6, 9), gradient=gradients, gradient_steps=(1, 2, 1), chained=chained
        )
        eye = torch.eye(len(a), dtype=torch.float64)
        for state, series in zip(states, (eye, eye + a.T, torch.linalg.inv(eye - a.T)), strict=True):
            (grad,) = torch.autograd.grad(state[0].sum(), b, retain_graph=True)
            torch.testing.assert_close(grad, (series @ ones).expand_as(b))


def test_linked_one_step_gradients_add_up_to_a_phantom_gradient() -> None:
    """Why: what the link claims, at a fixed point: n linked corrections carry n terms of the Neumann series."""
    a, b, expected = contraction()
    b.requires_grad_(True)
    ones = torch.ones(a.shape[0], dtype=torch.float64)

    def f(z: Tensor) -> tuple[Tensor]:
        return (z @ a.T + b,)

    last = sparse_correction(f, (expected,), (4, 8, 12), linked=True)[-1]
    (grad,) = torch.autograd.grad(last[0].sum(), b)
    series = sum(torch.linalg.matrix_power(a.T, i) for i in range(3))
    torch.testing.assert_close(grad, (series @ ones).expand_as(b))
    with pytest.raises(ValueError, match="linked needs a chain"):
        sparse_correction(f, (expected,), (4,), linked=True, chained=False)


@pytest.mark.parametrize("chained", [True, False])
def test_an_early_stop_drops_no_term_and_no_gradient(chained: bool) -> None:
    """Why: a loss that loses terms when the solve is easy teaches least what is nearly learnt."""
    weight = torch.tensor(0.1, requires_grad=True)
    evaluations = []

    def f(z: Tensor) -> tuple[Tensor]:
        evaluations.append(z)
        return (weight * z + 1,)

    states = sparse_correction(f, (torch.zeros(2, 1),), (10, 20, 30), tolerance=1e-4, chained=chained)
    assert len(evaluations) < 20, "the solve did not stop early"
    assert len(states) == 3
    for state in states:
        (grad,) = torch.autograd.grad(state[0].sum(), weight)
        assert float(grad) == pytest.approx(2 / 0.9, rel=1e-3)


def test_recurrent_counterpart_passes_gradient_through_all_steps_but_detached_tensors() -> None:
    """Why: the baseline of the comparison must be the true unrolled network, with RAFT's cut where asked for."""
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def f(u: Tensor, v: Tensor) -> State:
        return weight * u + 1, v + u

    start = (torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    whole, cut = unroll(f, start, 3)[-1], unroll(f, start, 3, detached=(0,))[-1]
    assert torch.equal(whole[0], cut[0]) and whole[0].item() == 1.75
    assert float(torch.autograd.grad(whole[0].sum(), weight)[0]) == 2.0  # d/dw (w (w + 1) + 1)
    assert float(torch.autograd.grad(cut[0].sum(), weight)[0]) == 1.5  # the last factor alone


def test_positions_are_even_and_leave_room() -> None:
    """Why: the trainer draws any number of iterations; the last must be corrected, and no two may collide."""
    assert uniform_positions(12, 3) == [4, 8, 12]
    assert uniform_positions(7, 3) == [2, 4, 7]
    assert uniform_positions(2, 3) == [1, 2]
    assert uniform_positions(7, 3, gap=3) == [3, 7]
    with pytest.raises(ValueError, match="gap 3, iterations 2"):
        uniform_positions(2, 1, gap=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": ()}, "increase from 1 on"),
        ({"positions": (0, 3)}, "increase from 1 on"),
        ({"positions": (3, 3)}, "increase from 1 on"),
        ({"positions": (2, 3), "gradient_steps": 2}, "leave no room for 2 gradient"),
        ({"positions": (2, 5), "gradient": [phantom_gradient]}, "expected 2 gradients and steps"),
    ],
)
def test_impossible_corrections_are_refused(arguments: dict, message: str) -> None:
    """Why: an error must say what was expected and what was got."""
    with pytest.raises(ValueError, match=message):
        sparse_correction(lambda z: (z,), (torch.zeros(1, 1),), **arguments)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        phantom_gradient(lambda z: (z,), (torch.zeros(1, 1),), steps=0)


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Why: it is the first thing a reader types; its gradient must be that of an unrolling."""
    page = (Path(__file__).parents[2] / "docs" / "equilibrium.md").read_text()
    names: dict = {}
    exec(page.split("```python")[1].split("```")[0], names)
    assert "converged" in capsys.readouterr().out
    (unrolled,) = unroll(names["f"], (torch.zeros(4, 8),), 60)[-1]
    (expected,) = torch.autograd.grad(unrolled.square().sum(), names["weight"])
    torch.testing.assert_close(names["weight"].grad, expected, rtol=1e-3, atol=1e-4)
