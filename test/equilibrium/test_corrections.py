# SPDX-License-Identifier: Apache-2.0
"""Corrections along a solve: where they are, what they cost and store, and what gradient each carries."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from small_problems import TwoTensors, contraction
from torch import Tensor

from benchmarks.memory import saved_bytes
from deq_flow_ros.equilibrium import (
    correction_weights,
    implicit_gradient,
    phantom_gradient,
    solve,
    sparse_correction,
    uniform_positions,
    unroll,
)


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


def test_each_correction_has_its_own_gradient() -> None:
    """Why: the paper mixes gradients along the way: cheap ones early, a better one at the end."""
    a, b, expected = contraction()
    b.requires_grad_(True)
    ones = torch.ones(a.shape[0], dtype=torch.float64)

    def f(z: Tensor) -> tuple[Tensor]:
        return (z @ a.T + b,)

    gradients = (phantom_gradient, partial(phantom_gradient, steps=2), partial(implicit_gradient, tolerance=1e-12))
    states = sparse_correction(f, (expected,), (3, 6, 9), gradient=gradients, gradient_steps=(1, 2, 1))
    eye = torch.eye(len(a), dtype=torch.float64)
    for state, series in zip(states, (eye, eye + a.T, torch.linalg.inv(eye - a.T)), strict=True):
        (grad,) = torch.autograd.grad(state[0].sum(), b, retain_graph=True)
        torch.testing.assert_close(grad, (series @ ones).expand_as(b))


def test_an_early_stop_drops_no_term_and_no_gradient() -> None:
    """Why: a loss that loses terms when the solve is easy teaches least what is nearly learnt."""
    weight = torch.tensor(0.1, requires_grad=True)
    evaluations = []

    def f(z: Tensor) -> tuple[Tensor]:
        evaluations.append(z)
        return (weight * z + 1,)

    states = sparse_correction(f, (torch.zeros(2, 1),), (10, 20, 30), tolerance=1e-4)
    assert len(evaluations) < 20, "the solve did not stop early"
    assert len(states) == 3
    for state in states:
        (grad,) = torch.autograd.grad(state[0].sum(), weight)
        assert float(grad) == pytest.approx(2 / 0.9, rel=1e-3)


def test_memory_does_not_grow_with_the_iterations() -> None:
    """Why: the reason for equilibrium models. The recurrent counterpart must grow, or the measure is blind."""
    model = TwoTensors()
    x = torch.zeros(64, 8, dtype=torch.float64)
    for gradient in (phantom_gradient, partial(phantom_gradient, steps=3), implicit_gradient):
        correct = partial(sparse_correction, gradient=gradient, gradient_steps=3)
        few, many = (
            saved_bytes(model, partial(correct, model.problem(x), model.start(64), (n // 2, n)))[1] for n in (12, 48)
        )
        assert few == many > 0
    few, many = (saved_bytes(model, partial(unroll, model.problem(x), model.start(64), n))[1] for n in (12, 48))
    assert many > 3.5 * few


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
