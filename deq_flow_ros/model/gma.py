# SPDX-License-Identifier: Apache-2.0
"""The update operator with global motion aggregation (GMA, arXiv 2104.02409).

A pixel that is occluded in the other image cannot be matched. Its motion is probably that of pixels that look similar.
The operator therefore sums the motion features of all positions, weighted by the similarity of their contexts.

Modules and attributes have the names of the keys in the released checkpoints (``to_v``, ``gamma``, ...).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deq_flow_ros.equilibrium import State
from deq_flow_ros.model.architecture import Architecture
from deq_flow_ros.model.update import FlowHead, Gates, MotionEncoder, SeparableConvGRU


class Attention(nn.Module):
    """How much each position attends to each other one, computed from the context alone (section 3.2, one head)."""

    # It runs once per pair, outside of the iterated function, so it is not normalised (nor is it in the release).
    weight_norm = False

    def __init__(self, context_dim: int) -> None:
        super().__init__()
        self.scale = context_dim**-0.5
        self.to_qk = nn.Conv2d(context_dim, 2 * context_dim, 1, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H * W, H * W), whose rows sum to 1."""
        query, key = self.to_qk(context).flatten(2).chunk(2, 1)
        attention = torch.bmm(self.scale * query.transpose(1, 2), key).softmax(2)
        # Under autocast the softmax is float32. Every iteration uses the result, so it is cast once, here.
        return attention.to(query.dtype)


class Aggregate(nn.Module):
    """``motion + gamma * attention @ value(motion)``; ``gamma`` is learnt, starting at zero."""

    def __init__(self, motion_dim: int) -> None:
        super().__init__()
        self.to_v = nn.Conv2d(motion_dim, motion_dim, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, motion: Tensor, attention: Tensor) -> Tensor:
        value = self.to_v(motion).flatten(2).transpose(1, 2)
        # (B, H * W, C) viewed as (B, C, H, W) is channels_last, like all tensors here.
        aggregated = torch.bmm(attention, value).transpose(1, 2).view(motion.shape)
        return motion + self.gamma * aggregated


class PreparedGma(NamedTuple):
    """What ``GmaUpdate`` computes from the context."""

    gates: list[Gates]
    attention: Tensor


class GmaUpdate(nn.Module):
    """Like ``RaftUpdate``, but the GRU also receives the aggregated motion features.

    The attention of a pair takes (H / 8 * W / 8)**2 numbers per image: 92 MB in float32 for 640x480 px.

    :ivar all_pairs: True says that memory grows with all pairs of cells; ``DEQFlow.max_pixels`` depends on it.
    """

    all_pairs = True

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.encoder = MotionEncoder(a.correlation_dim, a.motion_widths, a.motion_dim)
        self.attention = Attention(a.context_dim)
        self.gma = Aggregate(a.motion_dim)
        self.gru = SeparableConvGRU(a.hidden_dim, a.context_dim, 2 * a.motion_dim)
        self.flow_head = FlowHead(a.hidden_dim, a.flow_head_dim)

    def prepare(self, context: Tensor) -> PreparedGma:
        return PreparedGma(self.gru.prepare(context), self.attention(context))

    def forward(self, hidden: Tensor, flow: Tensor, correlation: Tensor, prepared: PreparedGma) -> State:
        motion = self.encoder(correlation, flow)
        motion = torch.cat((motion, self.gma(motion, prepared.attention)), 1)
        hidden = self.gru(hidden, motion, prepared.gates)
        return hidden, flow + self.flow_head(hidden)
