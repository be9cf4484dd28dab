# SPDX-License-Identifier: Apache-2.0
"""What the host is told of a batch that was solved: its fields and figures in one piece, for one transfer.

Also images and fields at another resolution, fields that are refined, and fields in colours.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Solution
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming.interface import Palette, Solved, Wanted

FIGURES = 5
"""Of each sample: those of ``Solution.figures``, and the likeness."""
# Smoothness, brightness and gradient constancy, weighed by the error on pairs with truth (docs/budget.md): OpenCV's own
# defaults, 20, 5 and 10, smooth twice as much as is best behind a network.
ALPHA, DELTA, GAMMA = 5.0, 1.0, 10.0


def find(model: DEQFlow, solution: Solution, wanted: Wanted) -> list[Tensor]:
    """The flow (B, 2, H, W), and (B, 1, H, W) each what else is wanted, in the order of ``Wanted``."""
    fields = [model.upsample(solution.state)]
    fields += [model.upsample_residual(solution)] if wanted.residual else []
    expected = model.upsample_uncertainty(solution.state) if wanted.uncertainty else None
    return fields if expected is None else [*fields, expected]


def pack(solution: Solution, fields: Sequence[Tensor], likenesses: Tensor, out: Tensor | None = None) -> Tensor:
    """The fields of ``find`` with the figures and likenesses (B,), as (B, N) float32 on the device; see ``unpack``."""
    figures = torch.cat((solution.figures().float(), likenesses.float()[:, None]), 1)
    parts = [*(field.permute(0, 2, 3, 1) for field in fields), figures]
    lengths = [part[0].numel() for part in parts]
    if out is None:
        out = figures.new_empty(len(figures), sum(lengths))
    for place, part in zip(out.split(lengths, 1), parts, strict=True):
        place.view(part.shape).copy_(part)
    return out


def unpack(
    solution: Solution, rows: np.ndarray, size: tuple[int, int], wanted: Wanted,
    came: Sequence[tuple[tuple[int, int, int, int], tuple[int, ...]]] = (),
) -> list[Solved]:  # fmt: skip
    """What an engine answers, of the rows of what ``pack`` made of fields of (H, W), padding included.

    :param came: of each sample the padding, for ``crop``, and (H, W) of the frame as it came; none for fields that are
        so already, which stay views of the rows.
    """
    figures, pixels = rows[:, -FIGURES:].tolist(), size[0] * size[1]
    answers = []
    for i, (made, residual_px, reason) in enumerate(solution.samples([sample[:-1] for sample in figures])):
        fields = [rows[i, : 2 * pixels].reshape(*size, 2), *rows[i, 2 * pixels : -FIGURES].reshape(-1, *size)]
        if came:
            (left, right, top, bottom), there = came[i]
            inside = slice(top, size[0] - bottom), slice(left, size[1] - right)
            fields = [resize_field(field[inside], there) for field in fields]
        rest = iter(fields[1:])
        residual, uncertainty = (next(rest) if asked else None for asked in wanted)
        told = made, solution.evaluations, residual_px, reason.value, figures[i][-1]
        answers.append(Solved(fields[0], residual, uncertainty, *told))
    return answers


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image at another (H, W); itself where it has that size."""
    if image.shape[:2] == size:
        return image
    interpolation = cv2.INTER_CUBIC if size[0] > image.shape[0] else cv2.INTER_AREA
    resized: np.ndarray = cv2.resize(image, (size[1], size[0]), interpolation=interpolation)
    return resized


def resize_field(field: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A flow (h, w, 2) or residual (h, w), in pixels of its own resolution, at another resolution in pixels of that."""
    before = field.shape[:2]
    if before == size:
        return np.ascontiguousarray(field)
    resized: np.ndarray = cv2.resize(field, (size[1], size[0]), interpolation=interpolation(before, size))
    ratio = np.array([size[1] / before[1], size[0] / before[0]], np.float32)
    return resized * (ratio if field.ndim == 3 else ratio.mean())


def interpolation(before: tuple[int, ...], size: tuple[int, ...]) -> int:
    """How OpenCV is to resize a field from one (H, W) to another."""
    return int(cv2.INTER_AREA if size[0] * size[1] < before[0] * before[1] else cv2.INTER_LINEAR)


def refined(flow: np.ndarray, image1: np.ndarray, image2: np.ndarray, iterations: int) -> np.ndarray:
    """The field that fits the images best near the one given, for what differs within a cell of the network.

    It fits brightness and gradients of the two images best while it stays smooth (Brox et al., High accuracy optical
    flow estimation based on a theory for warping, ECCV 2004), in OpenCV's implementation, with which its DIS flow ends
    as well (Kroeger et al., ECCV 2016).

    :param flow: (H, W, 2) float32 px, on the pixels of image 1; it stays as it is.
    :param image1: (H, W, 3) uint8 RGB, likewise image 2.
    :param iterations: linearisations, each with five steps of successive over-relaxation; at least 1.
    :returns: (H, W, 2) float32 px.
    """
    solver = cv2.VariationalRefinement.create()
    solver.setAlpha(ALPHA)
    solver.setDelta(DELTA)
    solver.setGamma(GAMMA)
    solver.setFixedPointIterations(iterations)
    grey1, grey2 = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (image1, image2))
    return np.asarray(solver.calc(grey1, grey2, flow.copy()))


def paint(palette: Palette, flow: Tensor, table: Tensor) -> Tensor:
    """The colours of a field, (H, W, 3) uint8 RGB; black where it is not finite. Nothing is read on the host.

    :param flow: (H, W, 2) px.
    :param table: that of the palette, on the device of the flow.
    """
    speed = flow.square().sum(2).sqrt()
    finite = speed.isfinite()
    if palette.max_px is None:
        scale = palette.radius / torch.where(finite, speed, 0.0).amax().clamp_min(1.0)
    else:
        scale = speed.new_full((), palette.radius / palette.max_px)
    # Vectors that are too long are pulled back to the rim.
    pull = scale * ((palette.radius + 2.0) / (speed * scale).clamp_min(1e-6)).clamp_max(1.0)
    columns, rows = torch.where(finite, flow.permute(2, 0, 1) * pull, 0.0).long().unbind()
    middle = palette.radius + 2
    return table[(rows + middle) * (2 * middle + 1) + columns + middle] * finite[..., None]
