# SPDX-License-Identifier: Apache-2.0
"""What ``DEQFlow.forward`` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deq_flow_ros.equilibrium import State, StopReason


@dataclass(frozen=True)
class Prediction:
    """What ``DEQFlow.forward`` returns.

    :ivar flow: (B, 2, H, W) px, x before y: from ``image1`` to ``image2`` on the pixels of ``image1``.
    :ivar residual: (B, 1, H, W) px, length of the last update per pixel: small where the iteration has settled, which
        says nothing about whether it has settled at the true flow.
    :ivar uncertainty: (B, 1, H, W) px, expected endpoint error per pixel, see ``UncertaintyHead``: large where the flow
        is probably wrong, as in areas without texture; None if the weights have no such head.
    :ivar state: (hidden, flow at 1/8), where a next solve can start.
    :ivar iterations: (B,) evaluations of the update operator.
    :ivar residual_px: (B,) RMS of the last update, px.
    :ivar stop_reasons: per sample.
    """

    flow: Tensor
    residual: Tensor
    uncertainty: Tensor | None
    state: State
    iterations: Tensor
    residual_px: Tensor
    stop_reasons: tuple[StopReason, ...]
