# SPDX-License-Identifier: Apache-2.0
"""Weight normalisation of an update operator (arXiv 1602.07868), and its removal for inference.

The filter of each output channel is a magnitude times a direction. This keeps the iterated function well-behaved during
training. For inference, the product is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# Names of a convolution's parametrised tensors in a state dict: the magnitude (C, 1, 1, 1) and the direction.
MAGNITUDE = "parametrizations.weight.original0"
DIRECTION = "parametrizations.weight.original1"


def add_weight_norm(operator: nn.Module) -> None:
    """Parametrise every convolution of an operator, except in modules with the attribute ``weight_norm = False``."""
    for convolution in dict.fromkeys(_convolutions(operator)):
        parametrizations.weight_norm(convolution)


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


def _convolutions(module: nn.Module) -> Iterator[nn.Conv2d]:
    if isinstance(module, nn.Conv2d):
        yield module
    elif getattr(module, "weight_norm", True):
        for child in module.children():
            yield from _convolutions(child)
