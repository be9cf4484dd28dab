# SPDX-License-Identifier: Apache-2.0
"""Correlation on a pyramid, looked up around the present flow (RAFT, arXiv 2003.12039, section 3.2).

Two ways to the same values: all pairs at once, or those that a lookup asks for when it asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():
    # PyTorch says once per process, at the first sparse matrix, that they may change.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.sparse_csr_tensor(torch.zeros(2), torch.zeros(0), torch.zeros(0), (1, 1), check_invariants=False)

# Above, the similarities of all pairs are not held, however often they would be used.
MAX_VOLUME_BYTES = 3 << 29
# A number of one large matrix product costs about as much less, per channel, as one that is computed alone.
MATRIX_ADVANTAGE = 1 / 48
# Of `_gathered_products`: 200 MB at 256 neighbours of 96 channels.
CELLS_AT_ONCE = 2048


class Correlation(Protocol):
    """What an update operator sees of two images."""

    def lookup(self, flow: Tensor) -> Tensor:
        """Correlation around ``position + flow``, bilinear, zero outside.

        :param flow: (B, 2, H, W), x before y, in cells of the feature map.
        :returns: (B, levels * (2 radius + 1)**2, H, W); within a level the x offset is the outer index.
        """


def correlate(
    features1: Tensor, features2: Tensor, levels: int, radius: int, iterations: int | None = None
) -> Correlation:
    """The correlation of two feature maps, in the way that costs least for so many lookups.

    Parameters as those of ``CorrelationPyramid``.

    :param iterations: lookups at most, none of which needs gradients; None: all pairs.
    """
    batch, channels, height, width = features1.shape
    cells = height * width
    targets = cells * 4 // 3  # of all levels together
    if iterations is not None:
        looked_up = iterations * levels * (2 * radius + 2) ** 2
        few = features1.device.type == "cpu" and looked_up * channels * MATRIX_ADVANTAGE <= targets
        if few or 4 * batch * cells * targets > MAX_VOLUME_BYTES:
            return OnDemandCorrelation(features1, features2, levels, radius)
    return CorrelationPyramid(features1, features2, levels, radius)


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
        """See ``Correlation``."""
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


class OnDemandCorrelation:
    """The values of a ``CorrelationPyramid``, each computed when it is looked up: memory in proportion to the cells.

    Without gradients, in float32. Parameters as there.

    :raises ValueError: if the features are part of a graph that gradients are to flow through.
    """

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int) -> None:
        if torch.is_grad_enabled() and (features1.requires_grad or features2.requires_grad):
            raise ValueError(
                "correlation on demand has no gradients: expected features that require none, got some that do; for "
                "training leave out the number of iterations (None), for inference use torch.no_grad()"
            )
        batch, channels, self.height, self.width = features1.shape
        self.radius = radius
        self._sources = _rows(features1.float()).reshape(-1, channels)
        features2 = features2.float()
        maps, sizes, starts = [], [], [0]
        for level in range(levels):
            if level:
                # What has nothing left to average is followed by maps of no cells: correlation is zero there.
                features2 = F.avg_pool2d(features2, 2) if min(features2.shape[-2:]) > 1 else features2[..., :0, :0]
            height, width = features2.shape[-2:]
            maps.append(_rows(F.pad(features2, (1, 1, 1, 1))))  # neighbours outside find zero in the border
            sizes.append((width, height))
            starts.append(starts[-1] + maps[-1].shape[1])
        self._targets = torch.cat(maps, 1).reshape(-1, channels)

        def integers(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=features1.device)

        self._sizes = integers(sizes).t()  # (2, levels)
        self._strides = self._sizes[0, :, None] + 2
        first = integers(range(batch)).repeat_interleave(self.height * self.width) * starts[-1]
        # The row of a map's cell at (0, 0), past the border.
        self._first = first[:, None, None] + integers(starts[:-1])[:, None] + self._strides + 1
        self._level_scale = 0.5 ** torch.arange(levels, device=features1.device)
        self._offsets = integers(range(-radius, radius + 2))
        self._grid = _positions(self.height, self.width, features1.device)

    def lookup(self, flow: Tensor) -> Tensor:
        """See ``Correlation``."""
        index, fraction = self._neighbours(flow)
        products = _sampled_products if flow.device.type == "cpu" else _gathered_products
        values = products(self._sources, self._targets, index.flatten(1)).view(index.shape)
        values = torch.lerp(values[:, :, :-1], values[:, :, 1:], fraction[:, 0, :, None, None])
        values = torch.lerp(values[..., :-1], values[..., 1:], fraction[:, 1, :, None, None])
        return values.view(flow.shape[0], self.height, self.width, -1).permute(0, 3, 1, 2)

    def _neighbours(self, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the targets around each cell's, (cells, levels, x, y), and the fractions (cells, 2, levels)."""
        position = (self._grid + flow.float()).permute(0, 2, 3, 1).reshape(-1, 2, 1) * self._level_scale
        bound = self._sizes + self.radius + 1  # farther outside all is zero as well; so the integers stay finite
        position = position.clamp(-bound, bound)
        base = position.floor()
        near = (base.int()[..., None] + self._offsets).clamp_min(-1).minimum(self._sizes[..., None])
        rows = near[:, 1] * self._strides + self._first
        return near[:, 0, :, :, None] + rows[:, :, None, :], position - base


def _sampled_products(sources: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """Scaled inner products of each source (N, C) with the targets (M, C) at its row of the index (N, n): (N, n).

    They are the places of a sparse matrix (N, M): no copy of a target is made, unlike by ``_gathered_products``.
    """
    cells, neighbours = index.shape
    # PyTorch lets a sparse matrix hold no more values than it has places, even where an index occurs twice.
    targets = F.pad(targets, (0, 0, 0, max(0, neighbours - len(targets))))
    ends = torch.arange(0, index.numel() + 1, neighbours, dtype=index.dtype)
    values = torch.zeros(index.numel())
    size = (cells, len(targets))
    places = torch.sparse_csr_tensor(ends, index.flatten(), values, size, check_invariants=False)
    scale = sources.shape[1] ** -0.5
    torch.sparse.sampled_addmm(places, sources, targets.t(), beta=0.0, alpha=scale, out=places)
    return places.values().view(cells, neighbours)


def _gathered_products(sources: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """The same on any device: the targets are copied, for so many cells at a time."""
    scaled = sources[:, :, None] * sources.shape[1] ** -0.5
    with torch.autocast(sources.device.type, enabled=False):  # it would multiply in another type than the sampled way
        parts = [
            torch.bmm(targets[rows.long()], some).squeeze(2)
            for rows, some in zip(index.split(CELLS_AT_ONCE), scaled.split(CELLS_AT_ONCE), strict=True)
        ]
    return torch.cat(parts)


def _rows(features: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H * W, C); of channels_last a view."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """(2, height, width) float32: x and y of every cell."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack((x, y))
