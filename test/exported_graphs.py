# SPDX-License-Identifier: Apache-2.0
"""A small model as ONNX graphs, exported once for all tests: the exporter takes many seconds whatever the size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from deq_flow_ros.model import Architecture, DEQFlow

SMALL = Architecture(
    "shared", 16, 16, (16, 16, 16, 16), 16, mask_dim=16, correlation_levels=2, correlation_radius=2, update="gma",
    uncertainty_dim=8,
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """The graphs of ``small_model``.

    :ivar difference_px: largest one between their flow and the model's, px.
    """

    folder: Path
    difference_px: float


def small_model() -> DEQFlow:
    """Random weights, and the attention of GMA, which begins at zero, switched on."""
    torch.manual_seed(0)
    model = DEQFlow(SMALL).eval().requires_grad_(False)
    model.update_block.gma.gamma.fill_(0.5)
    return model
