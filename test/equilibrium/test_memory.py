# SPDX-License-Identifier: Apache-2.0
"""What a training step of the flow model stores, and that recomputing it changes nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.memory import make_clip, objectives, saved_bytes
from deq_flow_ros.model import DEQFlow
from training.objective import Objective, make_gradient

CPU = torch.device("cpu")


def stored(model: DEQFlow, objective: Objective, iterations: int) -> int:
    exactly = replace(objective, cold_iterations=(iterations, iterations))
    clip = make_clip(64, 64, CPU)
    return saved_bytes(model, lambda: exactly.loss(model, clip, np.random.default_rng(0))[0])[1]


def test_equilibrium_training_stores_the_same_for_any_number_of_iterations() -> None:
    """Why: the reason to train this way; the recurrent counterpart grows, and so shows that the count sees it."""
    torch.manual_seed(0)
    model = DEQFlow("nano").train()
    for name, objective in objectives().items():
        few, many = stored(model, objective, 6), stored(model, objective, 18)
        if name == "recurrent":
            assert many > 1.9 * few
            continue
        assert few == many, name
        assert stored(model, replace(objective, recompute=True), 6) < 0.75 * few, name


@pytest.mark.parametrize("recurrent", [False, True])
def test_recomputing_changes_neither_gradients_nor_statistics(recurrent: bool) -> None:
    """Why: less memory must not mean another training; batch norms see the batch twice, and must count it once."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = DEQFlow("tiny").train()
        objective = Objective((2, 2), recurrent=recurrent, recompute=recompute, matching=0.0)
        objective.loss(model, make_clip(64, 64, CPU), np.random.default_rng(0))[0].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((gradients, {name: b.clone() for name, b in model.named_buffers()}))
    (gradients, buffers), (again, buffers_again) = results
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffers_again[name], buffer, msg=name)


def test_gradients_are_chosen_by_name() -> None:
    """Why: recipes name them; a wrong name must be told before the training, not after a night of it."""
    assert make_gradient("phantom-3")[1] == 3 and make_gradient("implicit")[1] == 1
    assert make_gradient("phantom-2-0.5")[0].keywords == {"steps": 2, "damping": 0.5}  # type: ignore[attr-defined]
    for wrong in ("phantom", "phantom-0", "phantom-2-1.5", "implicit-2", "newton"):
        with pytest.raises(ValueError, match="expected phantom-K"):
            Objective(gradient=wrong)
    with pytest.raises(ValueError, match="one for each of 3 corrections, got 2"):
        Objective(gradient="phantom-1,implicit")
    assert Objective(gradient="phantom-1,phantom-1,implicit").corrections == 3


@pytest.mark.parametrize("gradient", ["phantom-3", "implicit", "phantom-1,phantom-1,implicit"])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_every_gradient_trains_at_every_number_of_iterations(gradient: str, iterations: int) -> None:
    """Why: the number is drawn at random; too few for the gradient's steps must be raised, not refused."""
    torch.manual_seed(0)
    model = DEQFlow("nano").train()
    objective = Objective((iterations, iterations), gradient=gradient, jacobian=0.1)
    loss, measured = objective.loss(model, make_clip(64, 64, CPU), np.random.default_rng(0))
    loss.backward()
    assert torch.isfinite(loss) and measured["jacobian"] > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.update_block.parameters())
