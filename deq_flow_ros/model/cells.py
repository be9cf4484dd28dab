# SPDX-License-Identifier: Apache-2.0
"""Cells of 8x8 pixels: where they are, how alike, from them back to pixels, and states on them, moved and resized."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_flow_ros.equilibrium import State

FACTOR = 8
LIKENESS_CELLS = 1000
# Range of the logarithms of the Laplacians' scales: from 0.007 px to 55 px, which is an expected error of 89 px.
LOG_SCALES = (-5.0, 4.0)
# Mean length of a vector whose two components are independent and Laplacian with scale 1.
MEAN_LENGTH = 1 + math.asinh(1) / math.sqrt(2)

is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", lambda: False)
"""Whether PyTorch's compiler reads the code just now. PyTorch before 2.3 cannot say so, and is not asked to compile."""


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """(2, height, width) float32: x and y of every cell."""
    # Whole numbers first: TensorRT counts in these alone.
    columns, rows = torch.arange(width, device=device).float(), torch.arange(height, device=device).float()
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y))


def pooled(features: Tensor, levels: int) -> list[Tensor]:
    """The map averaged over ``2**l x 2**l`` cells, for each level ``l`` until it cannot be halved any more.

    Averages are computed in float32 from level to level, so each level is rounded only once.
    """
    maps, finer = [features], features.to(torch.promote_types(features.dtype, torch.float32))
    while len(maps) < levels and min(finer.shape[-2:]) > 1:
        finer = F.avg_pool2d(finer, 2)
        maps.append(finer.to(features.dtype))
    return maps


def likeness(flows: Tensor, features1: Tensor, features2: Tensor) -> Tensor:
    """How alike cells of two images are that a flow says are the same: mean cosine of their features, -1..1.

    About ``LIKENESS_CELLS`` cells, evenly spread, are compared. Those that a flow leads outside do not count; without
    any, or if the features are zero, the likeness is 0.

    :param flows: (N, 2, H, W) in cells, x before y; flows to try.
    :param features1: (1, C, H, W), of the image on whose pixels the flow lives; ``features2`` are those of the other.
    :returns: (N,) float32.
    """
    height, width = flows.shape[-2:]
    step = max(1, math.isqrt(height * width // LIKENESS_CELLS))
    # Rounded, not interpolated: a mean of cells is less like each of them, and only a flow of zero would have none.
    at = positions(height, width, flows.device)[:, ::step, ::step]
    to = flows[:, :, ::step, ::step].nan_to_num(nan=math.inf) + at
    x, y = to.round().clamp(-1, 1e6).long().unbind(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    rows1, rows2 = (features[0].permute(1, 2, 0) for features in (features1, features2))
    led_to = rows2.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, -1)
    alike = F.cosine_similarity(rows1[::step, ::step].float(), led_to.float(), dim=-1)
    return (alike * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)


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
    with torch.autocast(flow.device.type, enabled=False):
        fine = torch.bmm(neighbours.reshape(cells, 2, 9).contiguous(), weights)
    blocks = fine.view(batch, height, width, 2, FACTOR, FACTOR).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(batch, 2, FACTOR * height, FACTOR * width)


class UncertaintyHead(nn.Module):
    """Predicts, from the hidden state, a mixture of two Laplacians for the error of the flow.

    The mixture is that of SEA-RAFT (arXiv 2405.14793, section 3.2), but that both scales are predicted: in each
    Laplacian, the x and y components of the error are independent and have the same scale.

    :param width: channels of the hidden layer of the head.
    """

    def __init__(self, hidden_dim: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_dim, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 3, 1)
        with torch.no_grad():  # training starts near equal shares and scales of 1 px and 0.14 px
            self.conv2.bias.copy_(torch.tensor([0.0, 0.0, -2.0]))  # type: ignore[union-attr]

    def forward(self, hidden: Tensor) -> Tensor:
        """The parameters of the mixture at full resolution, (B, 3, 8 H, 8 W) float32; see ``mixture``."""
        parameters = self.conv2(F.relu(self.conv1(hidden))).float()
        return F.interpolate(parameters, scale_factor=FACTOR, mode="bilinear", align_corners=False)


def mixture(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of the shares of both Laplacians and of their scales in px, each (B, 2, H, W).

    :param parameters: (B, 3, H, W): logit of the first share, logarithms of the scales.
    """
    logit, scales = parameters[:, :1], parameters[:, 1:]
    return F.logsigmoid(torch.cat((logit, -logit), 1)), scales.clamp(*LOG_SCALES)


def expected_error(parameters: Tensor) -> Tensor:
    """The mean endpoint error of the mixture, (B, 1, H, W) px: ``MEAN_LENGTH`` times the mean of the scales."""
    shares, scales = mixture(parameters)
    return MEAN_LENGTH * (shares + scales).exp().sum(1, keepdim=True)


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
    before = torch.cat((hidden.float(), flow), 1)
    moved, weight = forward_warp(before, displacement)
    # Nothing landed on a cell that was uncovered or came into view. There, the earlier state of the same cell is
    # a better guess than zero.
    moved = torch.where(weight > 0.1, moved, before)
    hidden_moved = moved[:, :-2].to(hidden.dtype).contiguous(memory_format=torch.channels_last)
    return hidden_moved, moved[:, -2:].contiguous()


def rescale(state: State, size: Sequence[int], ratio: float) -> State:
    """Resize a state, (hidden, flow in cells), to another resolution.

    :param size: (H, W) in cells of the new resolution.
    :param ratio: the new resolution divided by the old one; lengths are multiplied by it.
    """
    hidden, flow = (F.interpolate(s.float(), size=tuple(size), mode="bilinear", align_corners=False) for s in state)
    return hidden.to(state[0].dtype).contiguous(memory_format=torch.channels_last), flow * ratio


def padding_of(height: int, width: int) -> tuple[int, int, int, int]:
    """The padding (left, right, top, bottom) that makes multiples of 8 of both sides; opposite sides share it."""
    extra_h, extra_w = -height % FACTOR, -width % FACTOR
    return extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2


def pad_to_multiple(image: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Repeat the border of an image (B, C, H, W) as ``padding_of`` its sides says, which is returned for ``crop``."""
    padding = padding_of(*image.shape[-2:])
    return (F.pad(image, padding, mode="replicate") if any(padding) else image), padding


def crop(field: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Undo ``pad_to_multiple`` for a field of the padded size, (B, C, H, W)."""
    left, right, top, bottom = padding
    return field[..., top : field.shape[-2] - bottom, left : field.shape[-1] - right]
