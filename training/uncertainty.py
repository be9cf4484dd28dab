# SPDX-License-Identifier: Apache-2.0
"""The loss of the head that predicts how wrong the flow is; the flow itself stays as it is.

``python -m training.train --recipe uncertainty --init WEIGHTS``
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deq_flow_ros.equilibrium import State, solve
from deq_flow_ros.model import DEQFlow, update_px, usable_levels
from deq_flow_ros.model.prediction import expected_error, mixture
from deq_flow_ros.streaming.warm_start import carry
from training.objective import Objective, weighted_mean
from training.rendering import Clip

BLANK_SHARE = 0.25
COARSE_SHARE = 0.5
COARSE_LEVELS, COARSE_ITERATIONS = 2, 4
AGAIN, REMEMBERED = 2, 200


class ErrorState(NamedTuple):
    """What the head is trained on, of a batch of solved pairs."""

    hidden: Tensor  # (B, C, H, W) float16
    error: Tensor  # (B, 2, 8 H, 8 W) float16, flow minus true flow, px
    valid: Tensor  # (B, 8 H, 8 W) bool


class UncertaintyLoss:
    """The loss of the head in a run: the mean negative log likelihood of the flow's error.

    Solving takes several times as long as a step of the head, so each step also sees ``AGAIN`` of the last
    ``REMEMBERED`` solved states again; with more, the head gets worse on pictures unlike the clips. A resumed run has
    none at first, and so differs from one that was not interrupted.
    """

    def __init__(self) -> None:
        self._states: deque[ErrorState] = deque(maxlen=REMEMBERED)

    def __call__(
        self, objective: Objective, model: DEQFlow, clip: Clip, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what to log: mean endpoint error and expected error, px. The head alone gets a gradient."""
        assert model.uncertainty is not None
        states = solved_states(objective, model, clip, rng)
        before = list(self._states)
        self._states.extend(states)
        if before:
            states = states + [before[int(place)] for place in rng.integers(len(before), size=AGAIN)]
        losses, errors, expected = [], [], []
        for hidden, error, valid in states:
            parameters = model.uncertainty(hidden.to(model.uncertainty.conv1.weight.dtype))
            losses.append(weighted_mean(negative_log_likelihood(parameters, error.float()), valid))
            errors.append(weighted_mean(error.float().norm(dim=1), valid))
            expected.append(weighted_mean(expected_error(parameters.detach())[:, 0], valid))
        measured = {"epe": torch.stack(errors).mean(), "expected": torch.stack(expected).mean()}
        return torch.stack(losses).mean(), measured


@torch.no_grad()
def solved_states(objective: Objective, model: DEQFlow, clip: Clip, rng: np.random.Generator) -> list[ErrorState]:
    """The pairs of a clip after any number of iterations, so that a flow that has not settled is known as such."""
    images = clip.images.float()
    if rng.random() < BLANK_SHARE:
        images = blank(images, rng)
    encodings = [model.encode(images[:, t]) for t in range(images.shape[1])]
    states = []
    state: State | None = None
    for t in range(images.shape[1] - 1):
        if state is not None:
            start = carry((state[0], state[1]))
            iterations = objective.draw_iterations(objective.warm_iterations, rng)
        else:
            iterations = objective.draw_iterations(objective.cold_iterations, rng)
            levels = min(COARSE_LEVELS, usable_levels(*images.shape[-2:])) if rng.random() < COARSE_SHARE else 0
            coarse = model.coarse_start(images[:, t], images[:, t + 1], levels, COARSE_ITERATIONS)
            start = coarse or model.initial_state(encodings[t])
        problem = model.problem(encodings[t], encodings[t + 1], iterations=iterations)
        state = solve(problem, start, max_iterations=iterations, measure=update_px, check_start=False).state
        error = model.upsample(state) - clip.flow[:, t]
        states.append(ErrorState(state[0].half(), error.half(), clip.valid[:, t]))
    return states


def negative_log_likelihood(parameters: Tensor, error: Tensor) -> Tensor:
    """Of an error vector per pixel, (B, 2, H, W) px, under the mixture, (B, H, W); up to a constant, log 4."""
    shares, scales = mixture(parameters)
    absolute = error.abs().sum(1, keepdim=True)  # both components have one scale: the product of their densities
    return -torch.logsumexp(shares - 2 * scales - absolute * torch.exp(-scales), 1)


def blank(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (B, T, 3, H, W) RGB 0..255 whose texture is (nearly) gone, in large areas with soft borders or everywhere.

    The true flow is what it was, so that the head learns that it is unknown there.
    """
    batch, _, _, height, width = images.shape
    areas = torch.from_numpy(rng.normal(0, 1, (batch, 1, 3, 4)).astype(np.float32)).to(images.device)
    areas = F.interpolate(areas, (height, width), mode="bicubic", align_corners=False).unsqueeze(1)
    everywhere = rng.random() < 0.4
    strength = torch.ones_like(areas) if everywhere else torch.sigmoid(8 * areas)
    left = float(np.exp(rng.uniform(np.log(1e-3), np.log(0.1)))) * (rng.random() < 0.5)  # of the contrast
    sigma = float(rng.uniform(0, 2)) * (rng.random() < 0.5)
    mean = images.mean((1, 3, 4), keepdim=True)
    noise = torch.from_numpy(rng.normal(0, 1, images.shape).astype(np.float32)).to(images.device)
    plain = mean + left * (images - mean) + sigma * noise
    return torch.lerp(images, plain, strength.expand_as(plain)).round().clamp(0, 255)
