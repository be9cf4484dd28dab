# SPDX-License-Identifier: Apache-2.0
"""What is predicted of a pair: its flow, and for each pixel a distribution of the error of the flow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_flow_ros.equilibrium import State, StopReason
from deq_flow_ros.model.cells import FACTOR

LOG_SCALES = (-5.0, 4.0)
"""Range of the logarithms of the Laplacians' scales: from 0.007 px, which is finer than flow is measured, to 55 px,
which is an expected error of 89 px; there are hardly any larger errors in training."""
MEAN_LENGTH = 1 + math.asinh(1) / math.sqrt(2)
"""Mean length of a vector whose two components are independent and Laplacian with scale 1."""


@dataclass(frozen=True)
class Prediction:
    """The result of ``DEQFlow.forward``.

    :ivar flow: (B, 2, H, W) px, x before y: from ``image1`` to ``image2``, on the pixels of ``image1``.
    :ivar residual: (B, 1, H, W) px, the length of the last update of each pixel. It is small where the iteration has
        settled, which need not be at the true flow.
    :ivar uncertainty: (B, 1, H, W) px, the expected endpoint error of each pixel; None if the weights have no
        ``UncertaintyHead``.
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


class UncertaintyHead(nn.Module):
    """Predicts, from the hidden state, a mixture of two Laplacians for the error of the flow.

    The mixture is that of SEA-RAFT (arXiv 2405.14793, section 3.2): in each Laplacian, the x and y components of the
    error are independent and have the same scale. SEA-RAFT fixes one scale at 1 px, because its mixture is also the
    loss of the flow. Here the flow is already trained and most of its errors are far below 1 px, so both are predicted.

    :param hidden_dim: channels of the hidden state.
    :param width: channels of the hidden layer of the head.
    """

    def __init__(self, hidden_dim: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_dim, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 3, 1)
        with torch.no_grad():  # training starts near equal shares and scales of 1 px and 0.14 px
            self.conv2.bias.copy_(torch.tensor([0.0, 0.0, -2.0]))  # type: ignore[union-attr]

    def forward(self, hidden: Tensor) -> Tensor:
        """Parameters of the mixture at full resolution, see ``mixture``.

        :param hidden: (B, C, H, W).
        :returns: (B, 3, 8 H, 8 W) float32.
        """
        parameters = self.conv2(F.relu(self.conv1(hidden))).float()
        return F.interpolate(parameters, scale_factor=FACTOR, mode="bilinear", align_corners=False)


def mixture(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of the shares of both Laplacians and of their scales in px, each (B, 2, H, W).

    :param parameters: (B, 3, H, W): logit of the first share, logarithms of the scales.
    """
    logit, scales = parameters[:, :1], parameters[:, 1:]
    return F.logsigmoid(torch.cat((logit, -logit), 1)), scales.clamp(*LOG_SCALES)


def expected_error(parameters: Tensor) -> Tensor:
    """The mean endpoint error of the mixture, (B, 1, H, W) px: ``MEAN_LENGTH`` times the mean of the scales."""
    shares, scales = mixture(parameters)
    return MEAN_LENGTH * (shares + scales).exp().sum(1, keepdim=True)
