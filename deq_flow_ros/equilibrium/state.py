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


def _inner(x: Tensor, y: Tensor) -> Tensor:
    # The squares of half precision numbers overflow and underflow.
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    product = x.to(wide) * y.to(wide)
    return (product.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else product).double()


def inner(a: State, b: State) -> Tensor:
    """Inner product per sample over all tensors of two states, (B,) float64."""
    return torch.stack([_inner(x, y) for x, y in zip(a, b, strict=True)]).sum(0)


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
    """For each sample ``yes`` where the mask (B,) is true, else ``no``."""
    return tuple(torch.where(per_sample(mask, a), a, b) for a, b in zip(yes, no, strict=True))


def detach(state: Sequence[Tensor]) -> State:
    """The state without its autograd graph."""
    return tuple(tensor.detach() for tensor in state)


def as_state(value: Sequence[Tensor]) -> State:
    """The caller's value as a state, after checks.

    :raises ValueError: if it is empty, or its tensors differ in batch size or device, or are not of real
        floating-point types.
    :raises TypeError: if it is not a tuple or list of tensors.
    """
    if isinstance(value, Tensor) or not isinstance(value, (tuple, list)):
        raise TypeError(f"a state is a tuple of tensors, (z,) for a single one; got {type(value).__name__}")
    state = tuple(value)
    for index, tensor in enumerate(state):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a state is a tuple of tensors; entry {index} is {type(tensor).__name__}")
        if tensor.dim() == 0 or not tensor.is_floating_point():
            raise ValueError(
                f"the tensors of a state are (B, ...) and of a real floating-point type; tensor {index} is "
                f"{tuple(tensor.shape)}, {tensor.dtype}"
            )
    if not state:
        raise ValueError("the state must hold at least one tensor, got an empty tuple")
    if len({tensor.shape[0] for tensor in state}) != 1:
        raise ValueError(f"the tensors of a state must share their batch size, got {[tuple(t.shape) for t in state]}")
    if len({tensor.device for tensor in state}) != 1:
        raise ValueError(f"the tensors of a state must be on one device, got {[str(t.device) for t in state]}")
    return state


def evaluate(f: Function, z: State) -> State:
    """``f(*z)``, after a check that it is a new state with tensors of the same number, shapes, types and device.

    :raises ValueError: if it is not, or if ``f`` has changed its input in place.
    """
    versions = [None if tensor.is_inference() else tensor._version for tensor in z]
    value = f(*z)
    state = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(state) != len(z):
        raise ValueError(f"f must return {len(z)} tensors as in the state it was given, got {len(state)}")
    for index, (new, old, version) in enumerate(zip(state, z, versions, strict=True)):
        if not isinstance(new, Tensor):
            raise ValueError(f"f must return tensors; for tensor {index} of the state it returned {type(new).__name__}")
        if new.shape != old.shape:
            raise ValueError(
                f"f must keep the shape of every tensor of the state: tensor {index} was {tuple(old.shape)}, "
                f"f returned {tuple(new.shape)}"
            )
        if new.dtype != old.dtype or new.device != old.device:
            raise ValueError(
                f"f must keep type and device of every tensor of the state: tensor {index} was {old.dtype} on "
                f"{old.device}, f returned {new.dtype} on {new.device}"
            )
        if version is not None and old._version != version:
            raise ValueError(f"f must return new tensors: it changed tensor {index} of its input in place")
    return state
