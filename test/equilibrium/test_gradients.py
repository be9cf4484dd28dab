# SPDX-License-Identifier: Apache-2.0
"""Gradients through fixed points against unrolling, closed forms, finite differences and another implementation."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from small_problems import TwoTensors, contraction, two_tensors
from torch import Tensor

from deq_flow_ros.equilibrium import (
    Anderson,
    Solution,
    State,
    StopReason,
    implicit_gradient,
    phantom_gradient,
    solve,
    unroll,
)


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
    weight = model.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(fixed_point, (weight, x), fast_mode=True)


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
    with pytest.raises(ValueError, match=r"detached must name tensors of the state, 0 to 1, got \[-1\]"):
        unroll(f, start, 3, detached=(0, -1))  # else the gradient would go on, and nobody would know


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Why: it is the first thing a reader types; its gradient must be that of an unrolling."""
    page = (Path(__file__).parents[2] / "docs" / "equilibrium.md").read_text()
    names: dict = {}
    exec(page.split("```python")[1].split("```")[0], names)
    assert "converged" in capsys.readouterr().out
    (unrolled,) = unroll(names["f"], (torch.zeros(4, 8),), 60)[-1]
    (expected,) = torch.autograd.grad(unrolled.square().sum(), names["weight"])
    torch.testing.assert_close(names["weight"].grad, expected, rtol=1e-3, atol=1e-4)
