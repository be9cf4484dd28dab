# SPDX-License-Identifier: Apache-2.0
"""Operations on states. A state is a tuple of tensors whose first dimension is the batch.

None of the operations flattens or joins tensors, so each tensor keeps its shape, type and memory layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Function = Callable[..., Sequence[Tensor]]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) viewed so that it broadcasts over ``like``, (B, ...)."""
    return values.view(-1, *([1] * (like.dim() - 1)))


def subtract(a: State, b: State) -> State:
    """``a - b``."""
    return tuple(x - y for x, y in zip(a, b, strict=True))


def add_scaled(a: State, factors: Tensor, b: State) -> State:
    """``a + factors * b`` with a factor (B,) per sample."""
    return tuple(x + per_sample(factors.to(x.dtype), x) * y for x, y in zip(a, b, strict=True))


def combine(weights: Tensor, states: Sequence[State]) -> State:
    """``sum_i weights[:, i] * states[i]``, weights (B, n)."""
    result = tuple(per_sample(weights[:, 0].to(x.dtype), x) * x for x in states[0])
    for index, state in enumerate(states[1:], 1):
        result = add_scaled(result, weights[:, index], state)
    return result


def select(mask: Tensor, yes: State, no: State) -> State:
    """For each sample ``yes`` where the mask (B,) is true, else ``no``."""
    return tuple(torch.where(per_sample(mask, a), a, b) for a, b in zip(yes, no, strict=True))
