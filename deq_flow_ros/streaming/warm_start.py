# SPDX-License-Identifier: Apache-2.0
"""Moves the fixed point of the last pair to the start of the next one; ``continuity`` decides whether it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from deq_flow_ros.equilibrium import State
from deq_flow_ros.model.cells import positions


def forward_warp(values: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Move every cell along its displacement and share it bilinearly among the four cells that it lands on.

    :param values: (B, C, H, W).
    :param displacement: (B, 2, H, W) in cells, x before y.
    :returns: the weighted mean of what landed on each cell (zero if nothing did), and the weight (B, 1, H, W).
    """
    batch, channels, height, width = values.shape
    x, y = positions(height, width, values.device)
    # The clamp keeps the integers finite, whatever the displacement; far outside, nothing lands in the image.
    target_x = (x + displacement[:, 0]).clamp(-2, width + 1)
    target_y = (y + displacement[:, 1]).clamp(-2, height + 1)
    x0, y0 = target_x.floor(), target_y.floor()
    fx, fy = target_x - x0, target_y - y0
    # The four cells around, (B, 4, H, W).
    cx, cy = torch.stack((x0, x0, x0 + 1, x0 + 1), 1).long(), torch.stack((y0, y0 + 1, y0, y0 + 1), 1).long()
    shares = torch.stack(((1 - fx) * (1 - fy), (1 - fx) * fy, fx * (1 - fy), fx * fy), 1)
    inside = (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
    index = cy.clamp(0, height - 1) * width + cx.clamp(0, width - 1)
    source = torch.cat((values, values.new_ones(batch, 1, height, width)), 1)
    shares = (shares * inside).to(source.dtype)
    landed = torch.zeros_like(source).flatten(2)
    # A GPU takes all four in one pass, which a compiler makes one loop of; on a CPU their copies would leave the cache.
    at_once = 1 if values.device.type == "cpu" else 4
    for to, share in zip(index.split(at_once, 1), shares.split(at_once, 1), strict=True):
        spread = (source[:, :, None] * share[:, None]).flatten(2)
        landed.scatter_add_(2, to.flatten(1)[:, None].expand_as(spread), spread)
    landed = landed.view(batch, channels + 1, height, width)
    weight = landed[:, -1:]
    return landed[:, :-1] / weight.clamp_min(1e-6) * (weight > 1e-6), weight


def carry(state: State, direction: str = "forward") -> State:
    """The state of one pair, moved to the pixels of the next pair.

    A flow that moves without its hidden state would be pulled away by a cold one.

    :param state: (hidden, flow in cells) of the last pair.
    :param direction: "forward" (flow on the earlier image's pixels: content moves by the flow) or "backward" (flow on
        the later image's pixels, pointing back: content moves against it).
    """
    return carry_by(state, state[1] if direction == "forward" else -state[1])


def carry_by(state: State, displacement: Tensor) -> State:
    """The state, moved by a displacement (B, 2, H, W) in cells; see ``carry``."""
    hidden, flow = state
    moved, weight = forward_warp(torch.cat((hidden.float(), flow), 1), displacement)
    # Nothing landed on a cell that was uncovered or came into view. There, the earlier state of the same cell is
    # a better guess than zero.
    moved = torch.where(weight > 0.1, moved, torch.cat((hidden.float(), flow), 1))
    hidden_moved = moved[:, :-2].to(hidden.dtype).contiguous(memory_format=torch.channels_last)
    return hidden_moved, moved[:, -2:].contiguous()
