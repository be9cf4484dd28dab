# SPDX-License-Identifier: Apache-2.0
"""Noise on the start of a solve. A fixed point does not depend on it; a network that is trained with it learns so."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from deq_flow_ros.equilibrium import State
from deq_flow_ros.model import FACTOR

HIDDEN_SHARE = 0.1
"""Standard deviation of the noise on the hidden state, relative to its root mean square."""
RANDOM_FLOW_PX = (1.0, 64.0)
"""Range of the standard deviation of a random start's flow, log-uniform."""
_KNOTS = (3, 4)


def perturb(state: State, keys: list[list[int]], strength_px: float) -> State:
    """A warm start, disturbed: a smooth field on the flow as a wrong estimate has, white noise on the hidden state.

    :param state: (hidden (B, C, H, W), flow (B, 2, H, W) in cells).
    :param keys: what the noise of each sample is a function of: the same in whatever batch or process it is drawn.
    :param strength_px: standard deviation of the flow's field at its knots, px of the full resolution.
    """
    hidden, flow = state
    noise, field = _noise(state, keys)
    return hidden + HIDDEN_SHARE * _size(hidden) * noise, flow + strength_px / FACTOR * field


def random_start(state: State, keys: list[list[int]], share: float) -> State:
    """Cold starts, some of them replaced by a random state (Equilibrium Reasoners, arXiv 2605.21488).

    A random state is white noise of the hidden state's size, and a smooth flow that has nothing to do with the images.

    :param state, keys: as for ``perturb``.
    :param share: probability with which a sample's start is replaced.
    """
    hidden, flow = state
    noise, field = _noise(state, keys)
    draws = [np.random.default_rng([*key, 1]) for key in keys]
    chosen = torch.tensor([float(rng.random() < share) for rng in draws]).to(flow).view(-1, 1, 1, 1)
    strength = torch.tensor([float(np.exp(rng.uniform(*np.log(RANDOM_FLOW_PX)))) for rng in draws]).to(flow)
    random = strength.view(-1, 1, 1, 1) / FACTOR * field
    return torch.lerp(hidden, _size(hidden) * noise, chosen.to(hidden)), torch.lerp(flow, random, chosen)


def _noise(state: State, keys: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """White noise in the shape of the hidden state, and a smooth field in that of the flow, both of unit variance."""
    hidden, flow = state
    fields, noises = [], []
    for key in keys:
        generator = torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))
        fields.append(torch.randn(2, *_KNOTS, generator=generator))
        noises.append(torch.randn(hidden.shape[1:], generator=generator))
    field = F.interpolate(torch.stack(fields).to(flow), flow.shape[-2:], mode="bilinear", align_corners=True)
    return torch.stack(noises).to(hidden), field


def _size(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.square().mean((1, 2, 3), keepdim=True).sqrt()
