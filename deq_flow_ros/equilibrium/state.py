# SPDX-License-Identifier: Apache-2.0
"""A state is a tuple of tensors whose first dimension is the batch: the few operations that solvers need on it.

None of them flattens or joins tensors, so that each keeps its shape, type and memory layout.
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


def _accumulated(values: Tensor) -> Tensor:
    """Sum over all but the batch, (B,); half precision is summed in float32."""
    wide = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
    dims = tuple(range(1, values.dim()))
    return values.sum(dims, dtype=wide) if dims else values.to(wide)


def inner(a: State, b: State) -> Tensor:
    """Inner product per sample over all tensors of two states, (B,) float64."""
    return torch.stack([_accumulated(x * y).double() for x, y in zip(a, b, strict=True)]).sum(0)


def norm(a: State) -> Tensor:
    """Euclidean length per sample over all tensors, (B,) float64."""
    return inner(a, a).sqrt()


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
    """Per sample ``yes`` where the mask (B,) holds, else ``no``."""
    return tuple(torch.where(per_sample(mask, a), a, b) for a, b in zip(yes, no, strict=True))


def detach(state: Sequence[Tensor]) -> State:
    """The state without its graph."""
    return tuple(tensor.detach() for tensor in state)


def checked(value: Sequence[Tensor] | Tensor, like: State) -> State:
    """What a function returned, as a state of the shapes it was given.

    :raises ValueError: if it is not.
    """
    state = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(state) != len(like):
        raise ValueError(f"f must return {len(like)} tensors as in the state it was given, got {len(state)}")
    for index, (new, old) in enumerate(zip(state, like, strict=True)):
        if new.shape != old.shape:
            raise ValueError(
                f"f must keep the shape of every tensor of the state: tensor {index} was {tuple(old.shape)}, "
                f"f returned {tuple(new.shape)}"
            )
    return state
