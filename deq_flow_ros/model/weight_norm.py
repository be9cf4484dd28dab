# SPDX-License-Identifier: Apache-2.0
"""Weight normalisation of an update operator (arXiv 1602.07868), and folding it away.

Each output channel's filter is a magnitude times a direction. It keeps the iterated function well-behaved while it is
trained (arXiv 2204.08442, section 4); for inference, the product is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

# How the parametrised tensors of a convolution are called in a state dict: magnitude (C, 1, 1, 1) and direction.
MAGNITUDE = "parametrizations.weight.original0"
DIRECTION = "parametrizations.weight.original1"


def add_weight_norm(operator: nn.Module) -> None:
    """Parametrise every convolution of an operator, except in modules that say ``weight_norm = False``."""
    for convolution in dict.fromkeys(_convolutions(operator)):
        parametrizations.weight_norm(convolution)


def fold_weight_norm(operator: nn.Module) -> None:
    """Undo ``add_weight_norm``, leaving the product as the weight: the same function."""
    for convolution in dict.fromkeys(_convolutions(operator)):
        requires_grad = convolution.get_parameter(DIRECTION).requires_grad
        weight = convolution.weight.detach().clone()
        parametrize.remove_parametrizations(convolution, "weight")
        # Left alone, the weight would be a parameter or a buffer depending on `requires_grad`.
        del convolution.weight
        convolution.weight = nn.Parameter(weight, requires_grad)
        convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _convolutions(module: nn.Module) -> Iterator[nn.Conv2d]:
    if isinstance(module, nn.Conv2d):
        yield module
    elif getattr(module, "weight_norm", True):
        for child in module.children():
            yield from _convolutions(child)
