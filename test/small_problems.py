# SPDX-License-Identifier: Apache-2.0
"""Problems with fixed points that are known in closed form or cheap to unroll, for the tests of gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from deq_flow_ros.equilibrium import Function, State


def contraction(dim: int = 6, rate: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """A (dim, dim) of spectral norm ``rate``, b (3, dim), and the fixed points of z = z A^T + b, in float64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    a = rate * a / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    return a, b, torch.linalg.solve(torch.eye(dim, dtype=torch.float64) - a, b.T).T


def two_tensors(weight: Tensor, bias: Tensor, u: Tensor, v: Tensor) -> State:
    """A small network on a state of two tensors that depend on each other."""
    z = torch.tanh(torch.cat((u.flatten(1), v), 1) @ weight.T + bias)
    return z[:, :6].reshape(-1, 2, 3), z[:, 6:]


class TwoTensors(nn.Module):
    """``two_tensors`` with parameters and an input."""

    def __init__(self, rate: float = 0.8) -> None:
        super().__init__()
        a, _, _ = contraction(8, rate)
        self.weight = nn.Parameter(a)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64))

    def problem(self, x: Tensor) -> Function:
        return partial(two_tensors, self.weight, self.bias + x)

    @staticmethod
    def start(batch: int) -> State:
        zeros = torch.zeros(batch, 8, dtype=torch.float64)
        return zeros[:, :6].reshape(-1, 2, 3), zeros[:, 6:]
