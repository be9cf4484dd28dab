# SPDX-License-Identifier: Apache-2.0
"""All-pairs correlation on a pyramid, and its lookup around the present flow (RAFT, arXiv 2003.12039, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class CorrelationPyramid:
    """Similarity of every position of one feature map with every position of another, at several scales of the other.

    :param features1: (B, C, H, W); the flow lives on its grid.
    :param features2: (B, C, H, W).
    :param levels: level ``l`` is the second map averaged over ``2**l x 2**l`` cells.
    :param radius: the lookup returns the ``(2 radius + 1)**2`` values around each target, per level.
    :ivar levels: per level, the similarities (B * H * W, h * w) and their h and w.
    """

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int) -> None:
        batch, channels, self.height, self.width = features1.shape
        self.radius = radius
        # One matrix product per level. Averaging the features before it gives the values of averaging the volume after
        # it, for a fraction of the work, since the product is linear.
        left = features1.flatten(2).transpose(1, 2) / channels**0.5
        self.levels: list[tuple[Tensor, int, int]] = []
        for level in range(levels):
            if level:
                if min(features2.shape[-2:]) < 2:
                    break  # nothing is left to average: further levels would lie outside, where correlation is zero
                features2 = F.avg_pool2d(features2, 2)
            height, width = features2.shape[-2:]
            volume = torch.bmm(left, features2.flatten(2))
            self.levels.append((volume.view(batch * self.height * self.width, height * width), height, width))
        self.missing = levels - len(self.levels)
        self._grid = _positions(self.height, self.width, left.device)

    @classmethod
    def from_volumes(cls, volumes: Sequence[Tensor], radius: int) -> CorrelationPyramid:
        """From what ``volumes`` returned, for graphs that compute and look up apart from each other."""
        pyramid = cls.__new__(cls)
        pyramid.radius, pyramid.missing = radius, 0
        pyramid.height, pyramid.width = volumes[0].shape[1:3]
        pyramid.levels = [(volume.flatten(0, 2).flatten(1), *volume.shape[3:]) for volume in volumes]
        pyramid._grid = _positions(pyramid.height, pyramid.width, volumes[0].device)
        return pyramid

    def volumes(self) -> list[Tensor]:
        """The similarities of the levels that there are, (B, H, W, h, w) each."""
        return [volume.view(-1, self.height, self.width, height, width) for volume, height, width in self.levels]

    def lookup(self, flow: Tensor) -> Tensor:
        """Correlation around ``position + flow``, bilinear, zero outside.

        :param flow: (B, 2, H, W), x before y, in cells of the feature map.
        :returns: (B, levels * (2 radius + 1)**2, H, W); within a level the x offset is the outer index.
        """
        batch = flow.shape[0]
        target = (self._grid + flow.float()).permute(0, 2, 3, 1).reshape(-1, 2)
        samples = [self._sample(volume, h, w, target / 2**level) for level, (volume, h, w) in enumerate(self.levels)]
        if self.missing:
            samples.append(samples[0].new_zeros(target.shape[0], self.missing * (2 * self.radius + 1) ** 2))
        # The channels are innermost here: viewed as (B, C, H, W) this is channels_last, which convolutions like best.
        return torch.cat(samples, 1).view(batch, self.height, self.width, -1).permute(0, 3, 1, 2)

    def _sample(self, volume: Tensor, height: int, width: int, target: Tensor) -> Tensor:
        """One level: gather the (2 r + 2)**2 integer neighbours once, then two linear interpolations.

        An order of magnitude faster on a CPU than ``grid_sample`` at (2 r + 1)**2 points of 4 neighbours each.
        """
        # Far outside every value is zero; clamping there keeps the integers finite and changes nothing. (One axis at a
        # time: a tensor of both bounds would be a constant in an exported graph, whatever the size of the images.)
        bound_x, bound_y = width + self.radius + 1, height + self.radius + 1
        target_x, target_y = target[:, 0:1].clamp(-bound_x, bound_x), target[:, 1:2].clamp(-bound_y, bound_y)
        base_x, base_y = target_x.detach().floor(), target_y.detach().floor()
        offsets = torch.arange(-self.radius, self.radius + 2, device=target.device)
        x, y = base_x.long() + offsets, base_y.long() + offsets
        index = y.clamp(0, height - 1).unsqueeze(1) * width + x.clamp(0, width - 1).unsqueeze(2)
        values = volume.gather(1, index.flatten(1)).view(-1, offsets.numel(), offsets.numel())
        # A neighbour outside has weight zero, in place of a border of zeros around the volume (a copy of all of it).
        inside_x = ((x >= 0) & (x < width)).to(values.dtype)
        inside_y = ((y >= 0) & (y < height)).to(values.dtype)
        fx, fy = (target_x - base_x).to(values.dtype), (target_y - base_y).to(values.dtype)
        values = values[:, :-1] * ((1 - fx) * inside_x[:, :-1]).unsqueeze(2) + values[:, 1:] * (
            fx * inside_x[:, 1:]
        ).unsqueeze(2)
        values = values[:, :, :-1] * ((1 - fy) * inside_y[:, :-1]).unsqueeze(1) + values[:, :, 1:] * (
            fy * inside_y[:, 1:]
        ).unsqueeze(1)
        return values.flatten(1)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """(2, height, width) float32: x and y of every cell."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack((x, y))
