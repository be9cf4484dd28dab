# SPDX-License-Identifier: Apache-2.0
"""The result of ``DEQFlow.forward``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deq_flow_ros.equilibrium import State, StopReason


@dataclass(frozen=True)
class Prediction:
    """The result of ``DEQFlow.forward``.

    :ivar flow: (B, 2, H, W) px, x before y: from ``image1`` to ``image2``, on the pixels of ``image1``.
    :ivar residual: (B, 1, H, W) px, the length of the last update of each pixel. It is small where the iteration has
        settled. This does not mean that it has settled at the true flow.
    :ivar uncertainty: (B, 1, H, W) px, the expected endpoint error of each pixel, see ``UncertaintyHead``. It is large
        where the flow is probably wrong, as in areas without texture. None if the weights have no such head.
    :ivar state: (hidden, flow at 1/8), from which the next solve can start.
    :ivar iterations: (B,) the number of evaluations of the update operator.
    :ivar residual_px: (B,) the RMS of the last update, px.
    :ivar stop_reasons: why each sample stopped.
    """

    flow: Tensor
    residual: Tensor
    uncertainty: Tensor | None
    state: State
    iterations: Tensor
    residual_px: Tensor
    stop_reasons: tuple[StopReason, ...]
