# SPDX-License-Identifier: Apache-2.0
"""Weight normalisation of update operators, and its folding into plain weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# Names of a convolution's parametrised tensors in a state dict: the magnitude (C, 1, 1, 1) and the direction.
MAGNITUDE = "parametrizations.weight.original0"
DIRECTION = "parametrizations.weight.original1"


def add_weight_norm(operator: nn.Module) -> None:
    """Make each filter a magnitude times a direction (arXiv 1602.07868), so that the iteration stays well-behaved.

    Modules with the attribute ``weight_norm = False`` are left as they are.
    """
    modules = list(operator.modules())
    without = {inner for module in modules if not getattr(module, "weight_norm", True) for inner in module.modules()}
    for module in modules:
        if isinstance(module, nn.Conv2d) and module not in without:
            parametrizations.weight_norm(module)


def fold_weight_norm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the same model without weight normalisation."""
    folded = {}
    for name, tensor in state_dict.items():
        if name.endswith(MAGNITUDE):
            direction = state_dict[name.removesuffix(MAGNITUDE) + DIRECTION]
            norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.dim())), keepdim=True)
            folded[name.removesuffix(MAGNITUDE) + "weight"] = direction * (tensor / norm)
        elif not name.endswith(DIRECTION):
            folded[name] = tensor
    return folded
