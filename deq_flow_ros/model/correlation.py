# SPDX-License-Identifier: Apache-2.0
"""Correlation on a pyramid, looked up around the current flow (RAFT, arXiv 2003.12039, section 3.2).

There are two ways to compute the same values: for all pairs of cells at once, or for each lookup only those it needs,
in memory that grows only in proportion to the number of cells.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from deq_flow_ros.model.cells import is_compiling, pooled, positions

with warnings.catch_warnings():
    # At the first sparse matrix, PyTorch says once per process that they may change, in words that differ by version.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(2), torch.zeros(0), torch.zeros(0), (1, 1), check_invariants=False)

# A volume of all pairs that is larger than this is never stored, however often it would be used.
MAX_VOLUME_BYTES = 3 << 29
# Cost per channel of a value in one large matrix product, relative to a value that is computed alone.
MATRIX_ADVANTAGE = 1 / 48
# Limit for the volume of the coarse levels if that of all is too large; at 1920x1080 px, all but the finest fit.
COARSE_VOLUME_BYTES = 3 << 28
# Cells per step of `_gathered_products`: 200 MB at 256 neighbours of 96 channels.
CELLS_AT_ONCE = 2048


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
        few = looked_up * channels * MATRIX_ADVANTAGE <= targets
        large = 4 * batch * cells * targets > MAX_VOLUME_BYTES
        if on_cpu and (few or large):
            return OnDemandCorrelation(features1, features2, levels, radius)
        if large:
            volume = features1.element_size() * batch * cells * targets
            fine = sum(volume >> 2 * level > COARSE_VOLUME_BYTES for level in range(levels))
            return MixedCorrelation(features1, features2, levels, radius, fine)
    return CorrelationPyramid(features1, features2, levels, radius)


class CorrelationPyramid:
    """Similarity of every position of one feature map with every position of another, whose scale varies by level.

    :param features1: (B, C, H, W), on whose grid the flow is defined; ``features2`` likewise, of the other image.
    :param levels: the number of levels; at level ``l`` the second map is averaged over ``2**l x 2**l`` cells.
    :param radius: a lookup returns the ``(2 radius + 1)**2`` values around each target, per level.
    :param first: the finest level that is computed.
    :ivar volumes: per level, the similarities (B, H, W, h, w).
    """

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int, first: int = 0) -> None:
        batch, channels, height, width = features1.shape
        # The product is linear: the mean of features before it is the mean of the volume after it, for less work.
        left = features1.flatten(2).transpose(1, 2) / channels**0.5
        maps = pooled(features2, levels)[first:]
        self.volumes = [torch.bmm(left, m.flatten(2)).view(batch, height, width, *m.shape[-2:]) for m in maps]
        # A map of one cell cannot be averaged any further: the remaining levels are zero.
        self._radius, self._first, self._missing = radius, first, levels - first - len(maps)
        self._grid = positions(height, width, left.device)

    def lookup(self, flow: Tensor) -> Tensor:
        """Correlation around ``position + flow``, with bilinear interpolation and zeros outside of the image.

        :param flow: (B, 2, H, W), x before y, in cells of the feature map.
        :returns: (B, levels * (2 radius + 1)**2, H, W); within a level the x offset is the outer index.
        """
        return look_up(self.volumes, self._grid + flow.float(), self._radius, self._first, self._missing)


def look_up(volumes: Sequence[Tensor], targets: Tensor, radius: int, first: int = 0, missing: int = 0) -> Tensor:
    """``CorrelationPyramid.lookup``, given the volumes.

    :param targets: (B, 2, H, W) float32, position + flow.
    :param first: the level of the first volume.
    :param missing: the number of levels after the last volume, which are zero.
    """
    batch, _, height, width = targets.shape
    rows = targets.permute(0, 2, 3, 1).reshape(-1, 2)
    samples = [_sample(volume, rows / 2**level, radius) for level, volume in enumerate(volumes, first)]
    if missing:
        samples.append(samples[0].new_zeros(len(rows), missing * (2 * radius + 1) ** 2))
    # Channels are innermost here. Viewed as (B, C, H, W) this is channels_last, the best layout for convolutions.
    return torch.cat(samples, 1).view(batch, height, width, -1).permute(0, 3, 1, 2)


def _sample(volume: Tensor, target: Tensor, radius: int) -> Tensor:
    """One level of a lookup: gather the (2 r + 2)**2 integer neighbours once, then interpolate along x and y."""
    # On a CPU this is ten times faster than grid_sample, which reads 4 neighbours at each of (2 r + 1)**2 points.
    height, width = volume.shape[-2:]
    # Far outside every value is zero, so a clamp there changes nothing and keeps the integers finite. A tensor of
    # both bounds would be a constant in an exported graph.
    bound_x, bound_y = width + radius + 1, height + radius + 1
    target_x, target_y = target[:, 0:1].clamp(-bound_x, bound_x), target[:, 1:2].clamp(-bound_y, bound_y)
    base_x, base_y = target_x.detach().floor(), target_y.detach().floor()
    offsets = torch.arange(-radius, radius + 2, device=target.device)
    x, y = base_x.long() + offsets, base_y.long() + offsets
    index = y.clamp(0, height - 1).unsqueeze(1) * width + x.clamp(0, width - 1).unsqueeze(2)
    values = volume.flatten(0, 2).flatten(1).gather(1, index.flatten(1)).view(-1, offsets.numel(), offsets.numel())
    values = values.to(torch.promote_types(volume.dtype, torch.float32))  # rounded once, after the interpolation
    # Neighbours outside get the weight zero. A border of zeros around the volume would need a copy of all of it.
    inside_x = ((x >= 0) & (x < width)).to(values.dtype)
    inside_y = ((y >= 0) & (y < height)).to(values.dtype)
    fx, fy = (target_x - base_x).to(values.dtype), (target_y - base_y).to(values.dtype)
    left, right = (1 - fx) * inside_x[:, :-1], fx * inside_x[:, 1:]
    values = values[:, :-1] * left.unsqueeze(2) + values[:, 1:] * right.unsqueeze(2)
    above, below = (1 - fy) * inside_y[:, :-1], fy * inside_y[:, 1:]
    values = values[:, :, :-1] * above.unsqueeze(1) + values[:, :, 1:] * below.unsqueeze(1)
    return values.flatten(1).to(volume.dtype)


class OnDemandCorrelation:
    """The values of a ``CorrelationPyramid``, each computed when it is looked up, without gradients.

    Both ways sum products in float32, round them to the type of the features, interpolate in float32 and round once
    more. As the order of the sums differs, values agree to a few millionths in float32, and in half precision but for
    one of 1,000 values, which is the next number. The parameters are those of ``CorrelationPyramid``.

    :raises ValueError: if the features require gradients.
    """

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int) -> None:
        if torch.is_grad_enabled() and (features1.requires_grad or features2.requires_grad):
            cure = "for training leave out the number of iterations (None), for inference use torch.no_grad()"
            raise ValueError(f"correlation on demand has no gradients, and the features require some; {cure}")
        batch, channels = features1.shape[:2]
        self._dtype, self._radius, device = features1.dtype, radius, features1.device
        self._sources = (features1 / channels**0.5).permute(0, 2, 3, 1).reshape(-1, channels)
        if device.type == "cpu":  # its sparse products need float32
            self._sources = self._sources.float()
        maps = pooled(features2, levels)
        # Levels below a map that cannot be halved any more have no cells, so their correlation is zero.
        maps += [maps[-1][..., :0, :0]] * (levels - len(maps))
        # All maps lie in one table of cells, each in a border of zeros, which neighbours outside of the image read. It
        # is so wide that neighbours need no clamping, but their target alone.
        border = 2 * radius + 2
        lengths = [(each.shape[2] + 2 * border) * (each.shape[3] + 2 * border) for each in maps]
        table = torch.zeros(batch, sum(lengths), channels, dtype=self._sources.dtype, device=device)
        for part, each in zip(table.split(lengths, 1), maps, strict=True):
            framed = part.unflatten(1, (each.shape[2] + 2 * border, -1))
            framed[:, border:-border, border:-border] = each.permute(0, 2, 3, 1)
        self._targets = table.view(-1, channels)
        # Not kept where a graph may be captured: that knows addresses alone, and not when a cache lets go of them.
        layout = _layout if device.type == "cpu" and not is_compiling() else _layout.__wrapped__
        sizes = tuple((each.shape[2], each.shape[3]) for each in maps)
        self._grid, self._scales, self._bounds, *rows = layout(batch, sizes, radius, device)
        self._strides, self._first, self._offsets = rows

    def lookup(self, flow: Tensor) -> Tensor:
        batch, _, height, width = flow.shape
        index, fraction = self._neighbours(flow)
        if flow.device.type == "cpu":
            products = _sampled_products
        else:
            products = _fused_products if is_compiling() else _gathered_products
        side = 2 * self._radius + 2
        values = products(self._sources, self._targets, index.flatten(1)).view(*index.shape[:2], side, side)
        values = values.to(self._dtype).float()
        values = torch.lerp(values[:, :, :-1], values[:, :, 1:], fraction[:, 0, :, None, None])
        values = torch.lerp(values[..., :-1], values[..., 1:], fraction[:, 1, :, None, None]).to(self._dtype)
        return values.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _neighbours(self, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Table rows of each target's neighbours (cells, levels, x and y), and the fractions (cells, 2, levels)."""
        position = (self._grid + flow.float()).permute(0, 2, 3, 1).reshape(-1, 2, 1) * self._scales
        position = position.clamp_min(-self._radius - 2).minimum(self._bounds)
        base = position.floor()
        x, y = base.nan_to_num(0.0).int().unbind(1)  # what is not a number stays one by its fraction
        rows = (x + y * self._strides).view(len(flow), -1, x.shape[1]) + self._first
        return rows.flatten(0, 1)[..., None] + self._offsets, position - base


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # else autograd would refuse what a stream has left here
def _layout(batch: int, sizes: tuple[tuple[int, int], ...], radius: int, device: torch.device) -> tuple[Tensor, ...]:
    """The places in the table of an ``OnDemandCorrelation``, whose maps have sizes (H, W). Nobody writes to them.

    :returns: positions of the cells; the scale of each level; the largest x and y of a target there, (2, levels), as
        all neighbours of one that is farther outside are zero; the table rows between a cell and the one below it; the
        row of its cell (0, 0), (B, 1, levels); and the rows from a cell to its neighbours, y innermost.
    """

    def integers(values: Iterable[int]) -> Tensor:  # a copy from the host could not be captured in a CUDA graph
        return torch.stack([torch.full((), value, dtype=torch.int32, device=device) for value in values])

    border = 2 * radius + 2
    heights, widths = map(integers, zip(*sizes, strict=True))
    strides = widths + 2 * border
    lengths = [(height + 2 * border) * (width + 2 * border) for height, width in sizes]
    starts = integers(accumulate(lengths[:-1], initial=0)) + border * (strides + 1)
    samples = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None]
    steps = torch.arange(-radius, radius + 2, dtype=torch.int32, device=device)
    offsets = (steps[:, None] + steps * strides[:, None, None]).flatten(1)
    bounds = (torch.stack((widths, heights)) + radius).float()
    grid, scales = positions(*sizes[0], device), 0.5 ** torch.arange(len(sizes), device=device)
    return grid, scales, bounds, strides, samples * sum(lengths) + starts, offsets


class MixedCorrelation:
    """Computes the finest levels, whose volume would take most of the memory, on demand, and stores that of the others.

    :param fine: the number of levels that are computed on demand, at least 1.
    :ivar coarse: the other levels; None if there are none.
    """

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int, fine: int) -> None:
        self._fine = OnDemandCorrelation(features1, features2, fine, radius)
        self.coarse = CorrelationPyramid(features1, features2, levels, radius, fine) if fine < levels else None

    def lookup(self, flow: Tensor) -> Tensor:
        fine = self._fine.lookup(flow)
        return fine if self.coarse is None else torch.cat((fine, self.coarse.lookup(flow)), 1)


Correlation = CorrelationPyramid | OnDemandCorrelation | MixedCorrelation


def _sampled_products(sources: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """Inner products of each source (N, C) with the targets (M, C) that its row of the index (N, n) names, float32."""
    # They are computed as the entries of a sparse matrix (N, M), which copies no targets.
    cells, neighbours = index.shape
    # PyTorch does not allow more values in a row of a sparse matrix than it has columns, even if an index occurs twice.
    targets = F.pad(targets, (0, 0, 0, max(0, neighbours - len(targets))))
    ends = torch.arange(0, index.numel() + 1, neighbours, dtype=index.dtype)
    values = torch.zeros(index.numel())
    places = torch.sparse_csr_tensor(ends, index.flatten(), values, (cells, len(targets)), check_invariants=False)
    torch.sparse.sampled_addmm(places, sources, targets.t(), beta=0.0, out=places)
    return places.values().view(cells, neighbours)


def _gathered_products(sources: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """The same on any device: the targets are copied, for ``CELLS_AT_ONCE`` cells at a time."""
    with torch.autocast(sources.device.type, enabled=False):  # autocast would multiply in another type
        parts = [
            torch.bmm(targets[rows.long()].float(), some.float()[:, :, None]).squeeze(2)
            for rows, some in zip(index.split(CELLS_AT_ONCE), sources.split(CELLS_AT_ONCE), strict=True)
        ]
    return torch.cat(parts)


def _fused_products(sources: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """The same for a compiler, which turns it into one loop and copies no targets."""
    return (targets[index.long()].float() * sources.float()[:, None]).sum(2)
