# SPDX-License-Identifier: Apache-2.0
"""What the loss of a clip is made of: which states and which pixels count, and how much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.memory import make_clip
from deq_flow_ros.model import DEQFlow
from training.flow_dataset import Clip
from training.objective import Objective

PLAIN = Objective(cold_iterations=(6, 6), corrections=2, matching=0.0, scale_px=float("inf"))
"""The endpoint error after three and after six iterations, and nothing else."""


@pytest.fixture(scope="module")
def model() -> DEQFlow:
    torch.manual_seed(0)
    return DEQFlow("nano").eval().requires_grad_(False)


def loss(model: DEQFlow, objective: Objective, clip: Clip) -> float:
    return float(objective.loss(model, clip, np.random.default_rng(0))[0])


def test_an_earlier_correction_weighs_less(model: DEQFlow) -> None:
    """Why: weighed alike, states on the way would pull the fixed point to what can be had in a few iterations."""
    clip = make_clip(64, 64, torch.device("cpu"))
    last, half, both = (loss(model, replace(PLAIN, gamma=gamma), clip) for gamma in (0.0, 0.5, 1.0))
    assert loss(model, replace(PLAIN, corrections=1), clip) == pytest.approx(last, rel=1e-5)
    assert half == pytest.approx((last + both) / 2, rel=1e-5) and both > 1.5 * last > 0


def test_pixels_without_ground_truth_do_not_count(model: DEQFlow) -> None:
    """Why: a data set has zeros there, and would teach that nothing moves. Hidden pixels count, but less."""
    clip = make_clip(64, 64, torch.device("cpu"))
    there = torch.zeros_like(clip.valid)
    there[..., :32] = True
    wrong = torch.where(there.unsqueeze(2), clip.flow, 1000.0)
    assert loss(model, PLAIN, replace(clip, flow=wrong, valid=there)) == pytest.approx(
        loss(model, PLAIN, replace(clip, valid=there)), rel=1e-5
    )
    hidden = replace(clip, flow=wrong, occluded=~there)
    assert loss(model, replace(PLAIN, occluded=1.0), hidden) > 2 * loss(model, replace(PLAIN, occluded=0.1), hidden)
    assert loss(model, replace(PLAIN, occluded=0.0), hidden) < 100
