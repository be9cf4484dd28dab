# SPDX-License-Identifier: Apache-2.0
"""Upsampling from 1/8 to the full resolution, and resizing of states from one resolution to another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from deq_flow_ros.equilibrium import State

FACTOR = 8


def convex_upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """Compute each fine pixel as a convex combination of its 3x3 coarse neighbours (RAFT, section 3.3).

    :param flow: (B, 2, H, W) in coarse cells.
    :param mask: (B, 9 * 64, H, W) logits, neighbour outermost, then fine row, then fine column.
    :returns: (B, 2, 8 H, 8 W) in pixels.
    """
    batch, _, height, width = flow.shape
    cells = batch * height * width
    # With channels innermost, this is one matrix product per cell, (2, 9) times (9, 64), without a copy of the mask.
    weights = mask.permute(0, 2, 3, 1).reshape(cells, 9, FACTOR * FACTOR).softmax(1)
    neighbours = F.unfold(FACTOR * flow, 3, padding=1).view(batch, 2, 9, height * width).permute(0, 3, 1, 2)
    # Matrices that are not contiguous would be multiplied one by one, which is several times slower on a CPU. Autocast
    # would round the flow: near 30 px, the steps of bfloat16 are an eighth of a pixel.
    lowered = torch.is_autocast_enabled(flow.device.type)
    with torch.autocast(flow.device.type, enabled=False) if lowered else nullcontext():
        fine = torch.bmm(neighbours.reshape(cells, 2, 9).contiguous(), weights).transpose(1, 2)
    blocks = fine.reshape(batch, height, width, FACTOR, FACTOR, 2).transpose(2, 3)
    return blocks.reshape(batch, FACTOR * height, FACTOR * width, 2).permute(0, 3, 1, 2)


def rescale(state: State, size: Sequence[int], ratio: float) -> State:
    """Resize a state, (hidden, flow in cells), to another resolution.

    :param size: (H, W) in cells of the new resolution.
    :param ratio: the new resolution divided by the old one; lengths are multiplied by it.
    """
    hidden, flow = (F.interpolate(s.float(), size=tuple(size), mode="bilinear", align_corners=False) for s in state)
    return hidden.to(state[0].dtype).contiguous(memory_format=torch.channels_last), flow * ratio


def pad_to_multiple(image: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Repeat the border until both sides are multiples of 8. Opposite sides share the padding.

    :param image: (B, C, H, W).
    :returns: the padded image, and (left, right, top, bottom) for ``crop``.
    """
    height, width = image.shape[-2:]
    extra_h, extra_w = -height % FACTOR, -width % FACTOR
    padding = (extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)
    return (F.pad(image, padding, mode="replicate") if extra_h or extra_w else image), padding


def crop(field: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Undo ``pad_to_multiple`` for a field of the padded size, (B, C, H, W)."""
    left, right, top, bottom = padding
    return field[..., top : field.shape[-2] - bottom, left : field.shape[-1] - right]
