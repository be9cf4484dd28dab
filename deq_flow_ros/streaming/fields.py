# SPDX-License-Identifier: Apache-2.0
"""What the host is told of a batch that was solved: its fields and figures in one piece, for one transfer.

Also images and fields at another resolution, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Solution
from deq_flow_ros.streaming.engine import Solved

FIGURES = 5
"""Of each sample: those of ``Solution.figures``, and the likeness."""


def pack(
    solution: Solution,
    flow: Tensor,
    residual: Tensor,
    uncertainty: Tensor | None,
    likenesses: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """(B, N) float32, on the device; see ``unpack``.

    :param flow: (B, H, W, 2).
    :param residual: (B, H, W).
    :param uncertainty: (B, H, W) or None.
    :param likenesses: (B,).
    :param out: where to; None: into a new tensor.
    """
    fields = [flow, residual, *([] if uncertainty is None else [uncertainty])]
    figures = [solution.figures().float(), likenesses.float()[:, None]]
    return torch.cat([*(field.flatten(1) for field in fields), *figures], 1, out=out)


@dataclass(frozen=True)
class Unpacked:
    """One sample on the host, views of what came.

    :ivar flow: (H, W, 2).
    :ivar residual: (H, W).
    :ivar uncertainty: (H, W) or None.
    :ivar figures: those of ``Solution.figures``.
    """

    flow: np.ndarray
    residual: np.ndarray
    uncertainty: np.ndarray | None
    figures: Sequence[float]
    likeness: float

    @classmethod
    def of(cls, row: np.ndarray, size: tuple[int, int]) -> Unpacked:
        """From a row of what ``pack`` made, whose fields are (H, W)."""
        pixels = size[0] * size[1]
        values, figures = row[:-FIGURES], row[-FIGURES:].tolist()
        flow, residual, uncertainty = np.split(values, (2 * pixels, 3 * pixels))
        return cls(
            flow.reshape(*size, 2),
            residual.reshape(size),
            uncertainty.reshape(size) if uncertainty.size else None,
            figures[:-1],
            figures[-1],
        )


def tell(solution: Solution, samples: Sequence[Unpacked]) -> list[Solved]:
    """What an engine answers, of samples at the resolution of their frames."""
    evaluations, rows = solution.evaluations, solution.samples([sample.figures for sample in samples])
    return [
        Solved(one.flow, one.residual, one.uncertainty, made, evaluations, residual_px, reason.value, one.likeness)
        for one, (made, residual_px, reason) in zip(samples, rows, strict=True)
    ]


def unpack(
    solution: Solution,
    rows: np.ndarray,
    size: tuple[int, int],
    came: Sequence[tuple[tuple[int, int, int, int], tuple[int, int]]],
) -> list[Solved]:
    """What an engine answers, of the rows of what ``pack`` made, with fields at the resolution of their frames.

    :param size: (H, W) of the fields, padding included.
    :param came: of each sample the padding, for ``crop``, and (H, W) of the frame as it came.
    """
    samples = []
    for row, ((left, right, top, bottom), there) in zip(rows, came, strict=True):
        one = Unpacked.of(row, size)
        inside = slice(top, size[0] - bottom), slice(left, size[1] - right)
        flow, residual = resize_field(one.flow[inside], there), resize_field(one.residual[inside], there)
        uncertainty = None if one.uncertainty is None else resize_field(one.uncertainty[inside], there)
        samples.append(replace(one, flow=flow, residual=residual, uncertainty=uncertainty))
    return tell(solution, samples)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image at another (H, W); itself where it has that size."""
    if image.shape[:2] == size:
        return image
    interpolation = cv2.INTER_CUBIC if size[0] > image.shape[0] else cv2.INTER_AREA
    resized: np.ndarray = cv2.resize(image, (size[1], size[0]), interpolation=interpolation)
    return resized


def resize_field(field: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A flow (h, w, 2) or residual (h, w), in pixels of its own resolution, at another resolution in pixels of that."""
    height, width = field.shape[:2]
    if (height, width) == size:
        return np.ascontiguousarray(field)
    how = interpolation((height, width), size)
    resized: np.ndarray = cv2.resize(field, (size[1], size[0]), interpolation=how)
    ratio = np.array([size[1] / width, size[0] / height], np.float32)
    return resized * (ratio if field.ndim == 3 else ratio.mean())


def interpolation(before: tuple[int, int], size: tuple[int, int]) -> int:
    """How OpenCV is to resize a field from one (H, W) to another."""
    return int(cv2.INTER_AREA if size[0] * size[1] < before[0] * before[1] else cv2.INTER_LINEAR)
