# SPDX-License-Identifier: Apache-2.0
"""Correlation that is computed when it is looked up. Its memory grows in proportion to the number of cells."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deq_flow_ros.model.cells import once_per_size, pooled, positions
from deq_flow_ros.model.older_torch import is_compiling

with warnings.catch_warnings():
    # At the first sparse matrix, PyTorch says once per process that they may change, in words that differ by version.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(2), torch.zeros(0), torch.zeros(0), (1, 1), check_invariants=False)

# Cells per step of `_gathered_products`: 200 MB at 256 neighbours of 96 channels.
CELLS_AT_ONCE = 2048


@dataclass(frozen=True)
class _Layout:
    """The positions of cells and levels in the table of targets, for maps of one size.

    :ivar bounds: (2, levels), the largest x and y of a target; all neighbours of one that is farther outside are zero.
    :ivar strides: (levels,) int32, number of table rows between a cell and the cell below it.
    :ivar first: (cells, levels) int32, table row of the cell (0, 0) of a level, inside of its border.
    :ivar level_scale: (levels,) scale of each level.
    :ivar offsets: (levels, (2 radius + 2)**2) int32, table rows from a cell to its neighbours, y innermost.
    """

    bounds: Tensor
    strides: Tensor
    first: Tensor
    level_scale: Tensor
    offsets: Tensor


@once_per_size
def _layout(batch: int, cells: int, sizes: tuple[tuple[int, int], ...], radius: int, device: torch.device) -> _Layout:
    border = _border(radius)
    starts = [0]
    for width, height in sizes:
        starts.append(starts[-1] + (width + 2 * border) * (height + 2 * border))

    def integers(values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    both = integers(sizes).t()
    strides = both[0] + 2 * border
    first = integers(range(batch)).repeat_interleave(cells)[:, None] * starts[-1]
    first = first + integers(starts[:-1]) + border * (strides + 1)
    scale = 0.5 ** torch.arange(len(sizes), device=device)
    steps = integers(range(-radius, radius + 2))
    offsets = (steps[:, None] + steps * strides[:, None, None]).flatten(1)
    return _Layout((both + radius).float(), strides, first, scale, offsets)


def _border(radius: int) -> int:
    """Rows and columns of zeros around each map: so many that neighbours need no clamping, but their target alone."""
    return 2 * radius + 2


class OnDemandCorrelation:
    """The values of a ``CorrelationPyramid``, each computed when it is looked up, without gradients.

    Both ways sum products in float32, round them to the type of the features, interpolate in float32 and round once
    more. They differ in the order of the sums. In float32, values therefore agree to a few millionths. In half
    precision they are equal, except if the exact sum is half-way between two numbers to within the rounding of float32:
    4 of 100,000 values in bfloat16 and 5 of 10,000 in float16 are neighbours. The parameters are those of
    ``CorrelationPyramid``.

    :raises ValueError: if the features require gradients.
    """

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int) -> None:
        if torch.is_grad_enabled() and (features1.requires_grad or features2.requires_grad):
            raise ValueError(
                "correlation on demand has no gradients: expected features that require none, got some that do; for "
                "training leave out the number of iterations (None), for inference use torch.no_grad()"
            )
        batch, channels, self.height, self.width = features1.shape
        self._dtype = features1.dtype
        self._sources = _rows(features1 / channels**0.5).reshape(-1, channels)
        maps = pooled(features2, levels)
        # Levels below a map that cannot be halved any more have no cells, so their correlation is zero.
        maps += [maps[-1][..., :0, :0]] * (levels - len(maps))
        sizes, border = tuple((map.shape[3], map.shape[2]) for map in maps), _border(radius)
        on_cpu = features1.device.type == "cpu"  # its sparse products need float32
        lengths = [(width + 2 * border) * (height + 2 * border) for width, height in sizes]
        dtype = torch.float32 if on_cpu else self._dtype
        table = torch.zeros(batch, sum(lengths), channels, dtype=dtype, device=features1.device)
        for part, map, (width, height) in zip(table.split(lengths, 1), maps, sizes, strict=True):
            # Neighbours outside of the image read zeros from this border.
            framed = part.view(batch, height + 2 * border, width + 2 * border, channels)
            framed[:, border : border + height, border : border + width] = map.permute(0, 2, 3, 1)
        self._targets = table.view(-1, channels)
        self._layout = _layout(batch, self.height * self.width, sizes, radius, features1.device)
        self._radius = radius
        self._grid = positions(self.height, self.width, features1.device)
        if on_cpu:
            self._sources = self._sources.float()

    def lookup(self, flow: Tensor) -> Tensor:
        """See ``Correlation``."""
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
        return values.view(flow.shape[0], self.height, self.width, -1).permute(0, 3, 1, 2)

    def _neighbours(self, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Table rows of each target's neighbours (cells, levels, x and y), and the fractions (cells, 2, levels)."""
        layout = self._layout
        position = (self._grid + flow.float()).permute(0, 2, 3, 1).reshape(-1, 2, 1) * layout.level_scale
        position = position.clamp_min(-self._radius - 2).minimum(layout.bounds)
        base = position.floor()
        x, y = base.nan_to_num(0.0).int().unbind(1)  # what is not a number stays one by its fraction
        return (x + y * layout.strides + layout.first)[..., None] + layout.offsets, position - base


def _sampled_products(sources: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    """Inner products of each source (N, C) with the targets (M, C) that its row of the index (N, n) names: (N, n).

    The products are float32. They are computed as the entries of a sparse matrix (N, M), which copies no targets,
    unlike ``_gathered_products``.
    """
    cells, neighbours = index.shape
    # PyTorch does not allow more values in a row of a sparse matrix than it has columns, even if an index occurs twice.
    targets = F.pad(targets, (0, 0, 0, max(0, neighbours - len(targets))))
    ends = torch.arange(0, index.numel() + 1, neighbours, dtype=index.dtype)
    values = torch.zeros(index.numel())
    size = (cells, len(targets))
    places = torch.sparse_csr_tensor(ends, index.flatten(), values, size, check_invariants=False)
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


def _rows(features: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H * W, C). If the layout is channels_last, this is a view."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)
