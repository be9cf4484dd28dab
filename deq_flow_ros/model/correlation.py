# SPDX-License-Identifier: Apache-2.0
"""Correlation on a pyramid, looked up around the current flow (RAFT, arXiv 2003.12039, section 3.2).

There are two ways to compute the same values: for all pairs of cells at once, or for each lookup only those it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from deq_flow_ros.model.cells import pooled, positions
from deq_flow_ros.model.on_demand import OnDemandCorrelation

# A volume of all pairs that is larger than this is never stored, however often it would be used.
MAX_VOLUME_BYTES = 3 << 29
# Cost per channel of a value in one large matrix product, relative to a value that is computed alone.
MATRIX_ADVANTAGE = 1 / 48
# Limit for the volume of the coarse levels if that of all levels is too large: at 1920x1080 in half precision, this
# allows all levels but the finest.
COARSE_VOLUME_BYTES = 3 << 28


class Correlation(Protocol):
    """The correlation of two images, as an update operator uses it."""

    def lookup(self, flow: Tensor) -> Tensor:
        """Correlation around ``position + flow``, with bilinear interpolation and zeros outside of the image.

        :param flow: (B, 2, H, W), x before y, in cells of the feature map.
        :returns: (B, levels * (2 radius + 1)**2, H, W); within a level the x offset is the outer index.
        """


def correlate(
    features1: Tensor, features2: Tensor, levels: int, radius: int, iterations: int | None = None
) -> Correlation:
    """The correlation of two feature maps, computed in the way that costs least for the given number of lookups.

    The other parameters are those of ``CorrelationPyramid``.

    :param iterations: the largest number of lookups, none of which needs gradients; None: all pairs are computed.
    """
    batch, channels, height, width = features1.shape
    cells, on_cpu = height * width, features1.device.type == "cpu"
    targets = cells * 4 // 3  # of all levels together
    if iterations is not None:
        looked_up = iterations * levels * (2 * radius + 2) ** 2
        few = on_cpu and looked_up * channels * MATRIX_ADVANTAGE <= targets
        large = 4 * batch * cells * targets > MAX_VOLUME_BYTES
        if few or (large and on_cpu):
            return OnDemandCorrelation(features1, features2, levels, radius)
        if large:
            volume, fine = features1.element_size() * batch * cells * targets, 0
            while fine < levels and volume >> 2 * fine > COARSE_VOLUME_BYTES:
                fine += 1
            return MixedCorrelation(features1, features2, levels, radius, fine)
    return CorrelationPyramid(features1, features2, levels, radius)


class CorrelationPyramid:
    """Similarity of every position of one feature map with every position of another, whose scale varies by level.

    :param features1: (B, C, H, W); the flow is defined on its grid.
    :param features2: (B, C, H, W).
    :param levels: the number of levels; at level ``l`` the second map is averaged over ``2**l x 2**l`` cells.
    :param radius: a lookup returns the ``(2 radius + 1)**2`` values around each target, per level.
    :param first: the finest level that is computed.
    :ivar levels: per level, the similarities (B * H * W, h * w) and their h and w.
    """

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int, first: int = 0) -> None:
        batch, channels, self.height, self.width = features1.shape
        self.radius, self._first = radius, first
        # One matrix product per level. The product is linear, so averaging the features before it gives the same values
        # as averaging the volume after it, for a fraction of the work.
        left = features1.flatten(2).transpose(1, 2) / channels**0.5
        self.levels: list[tuple[Tensor, int, int]] = []
        for averaged in pooled(features2, levels)[first:]:
            height, width = averaged.shape[-2:]
            volume = torch.bmm(left, averaged.flatten(2))
            self.levels.append((volume.view(batch * self.height * self.width, height * width), height, width))
        # A map of one cell cannot be averaged any further: the remaining levels are zero.
        self.missing = levels - first - len(self.levels)
        self._grid = positions(self.height, self.width, left.device)

    @classmethod
    def from_volumes(cls, volumes: Sequence[Tensor], radius: int) -> CorrelationPyramid:
        """The correlation from the result of ``volumes``, for exported graphs that compute and look up separately."""
        pyramid = cls.__new__(cls)
        pyramid.radius, pyramid.missing, pyramid._first = radius, 0, 0
        pyramid.height, pyramid.width = volumes[0].shape[1:3]
        pyramid.levels = [(volume.flatten(0, 2).flatten(1), *volume.shape[3:]) for volume in volumes]
        pyramid._grid = positions(pyramid.height, pyramid.width, volumes[0].device)
        return pyramid

    def volumes(self) -> list[Tensor]:
        """The similarities of all computed levels, (B, H, W, h, w) each."""
        return [volume.view(-1, self.height, self.width, height, width) for volume, height, width in self.levels]

    def lookup(self, flow: Tensor) -> Tensor:
        """See ``Correlation``."""
        batch = flow.shape[0]
        target = (self._grid + flow.float()).permute(0, 2, 3, 1).reshape(-1, 2)
        numbered = enumerate(self.levels, self._first)
        samples = [self._sample(volume, h, w, target / 2**level) for level, (volume, h, w) in numbered]
        if self.missing:
            samples.append(samples[0].new_zeros(target.shape[0], self.missing * (2 * self.radius + 1) ** 2))
        # Channels are innermost here. Viewed as (B, C, H, W) this is channels_last, the best layout for convolutions.
        return torch.cat(samples, 1).view(batch, self.height, self.width, -1).permute(0, 3, 1, 2)

    def _sample(self, volume: Tensor, height: int, width: int, target: Tensor) -> Tensor:
        """One level of a lookup: gather the (2 r + 2)**2 integer neighbours once, then interpolate along x and y.

        On a CPU this is an order of magnitude faster than ``grid_sample`` at (2 r + 1)**2 points of 4 neighbours each.
        """
        # Far outside every value is zero, so clamping there changes nothing and keeps the integers finite. Each axis is
        # clamped by itself, because a tensor of both bounds would be a constant in an exported graph.
        bound_x, bound_y = width + self.radius + 1, height + self.radius + 1
        target_x, target_y = target[:, 0:1].clamp(-bound_x, bound_x), target[:, 1:2].clamp(-bound_y, bound_y)
        base_x, base_y = target_x.detach().floor(), target_y.detach().floor()
        offsets = torch.arange(-self.radius, self.radius + 2, device=target.device)
        x, y = base_x.long() + offsets, base_y.long() + offsets
        index = y.clamp(0, height - 1).unsqueeze(1) * width + x.clamp(0, width - 1).unsqueeze(2)
        values = volume.gather(1, index.flatten(1)).view(-1, offsets.numel(), offsets.numel())
        values = values.to(torch.promote_types(volume.dtype, torch.float32))  # rounded once, after the interpolation
        # Neighbours outside get the weight zero. A border of zeros around the volume would need a copy of all of it.
        inside_x = ((x >= 0) & (x < width)).to(values.dtype)
        inside_y = ((y >= 0) & (y < height)).to(values.dtype)
        fx, fy = (target_x - base_x).to(values.dtype), (target_y - base_y).to(values.dtype)
        values = values[:, :-1] * ((1 - fx) * inside_x[:, :-1]).unsqueeze(2) + values[:, 1:] * (
            fx * inside_x[:, 1:]
        ).unsqueeze(2)
        values = values[:, :, :-1] * ((1 - fy) * inside_y[:, :-1]).unsqueeze(1) + values[:, :, 1:] * (
            fy * inside_y[:, 1:]
        ).unsqueeze(1)
        return values.flatten(1).to(volume.dtype)


class MixedCorrelation:
    """Correlation that computes the finest levels on demand and stores the volume of the coarse levels.

    The finest levels would take most of the memory. The other parameters are those of ``CorrelationPyramid``.

    :param fine: the number of levels that are computed on demand, at least 1.
    """

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int, fine: int) -> None:
        self._fine = OnDemandCorrelation(features1, features2, fine, radius)
        self._coarse = CorrelationPyramid(features1, features2, levels, radius, fine) if fine < levels else None

    def volume_bytes(self) -> int:
        """The size of the stored coarse levels in bytes."""
        return 0 if self._coarse is None else sum(volume.nbytes for volume, _, _ in self._coarse.levels)

    def lookup(self, flow: Tensor) -> Tensor:
        """See ``Correlation``."""
        fine = self._fine.lookup(flow)
        return fine if self._coarse is None else torch.cat((fine, self._coarse.lookup(flow)), 1)
