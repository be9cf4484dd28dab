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
_KNOTS = (3, 4)


def perturb(state: State, keys: list[list[int]], strength_px: float) -> State:
    """A warm start, disturbed: a smooth field on the flow as a wrong estimate has, white noise on the hidden state.

    :param state: (hidden (B, C, H, W), flow (B, 2, H, W) in cells).
    :param keys: what the noise of each sample is a function of: the same in whatever batch or process it is drawn.
    :param strength_px: standard deviation of the flow's field at its knots, px of the full resolution.
    """
    hidden, flow = state
    fields, noises = [], []
    for key in keys:
        generator = torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))
        fields.append(torch.randn(2, *_KNOTS, generator=generator))
        noises.append(torch.randn(hidden.shape[1:], generator=generator))
    field = F.interpolate(torch.stack(fields).to(flow), flow.shape[-2:], mode="bilinear", align_corners=True)
    size = hidden.square().mean((1, 2, 3), keepdim=True).sqrt()
    return hidden + HIDDEN_SHARE * size * torch.stack(noises).to(hidden), flow + strength_px / FACTOR * field
