# SPDX-License-Identifier: Apache-2.0
"""Flow as colour, on the device that has the flow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Palette:
    """The colours of vectors.

    :ivar table: ((2 radius + 5)**2, 3) uint8 RGB, the colour of each vector from ``(-radius - 2, -radius - 2)`` on, x
        innermost. The outer two steps are for vectors that are too long.
    :ivar radius: the number of steps from no motion to ``max_px``.
    :ivar max_px: length of the longest vector that is not too long; None: the longest finite one of each field, but at
        least 1 px.
    """

    table: np.ndarray
    radius: int
    max_px: float | None = None

    def paint(self, flow: Tensor, table: Tensor) -> Tensor:
        """The colours of a field, (H, W, 3) uint8 RGB; black where it is not finite. Nothing is read on the host.

        :param flow: (H, W, 2) px.
        :param table: ``table``, on the device of the flow.
        """
        speed = flow.square().sum(2).sqrt()
        finite = speed.isfinite()
        if self.max_px is None:
            scale = self.radius / torch.where(finite, speed, 0.0).amax().clamp_min(1.0)
        else:
            scale = speed.new_full((), self.radius / self.max_px)
        # Vectors that are too long are pulled back to the rim.
        pull = scale * ((self.radius + 2.0) / (speed * scale).clamp_min(1e-6)).clamp_max(1.0)
        columns, rows = torch.where(finite, flow.permute(2, 0, 1) * pull, 0.0).long().unbind()
        middle = self.radius + 2
        return table[(rows + middle) * (2 * middle + 1) + columns + middle] * finite[..., None]
