# SPDX-License-Identifier: Apache-2.0
"""The parts of a field that are worth compiling, as functions of tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Rules, Samples, State
from deq_flow_ros.model import DEQFlow, Encoding, FlowProblem, pad_to_multiple, update_px
from deq_flow_ros.streaming.warm_start import carry_by

Function = TypeVar("Function", bound=Callable[..., Any])


def encode(model: DEQFlow, pixels: Tensor) -> tuple[Encoding, Tensor]:
    """An encoding, and the images that it is of, scaled and padded.

    :param pixels: (B, H, W, 3) uint8 RGB.
    """
    padded, _ = pad_to_multiple(pixels.permute(0, 3, 1, 2).float())
    return model.encode(padded), padded


def move(state: State, sign: Tensor) -> State:
    """``carry`` in a direction that a replay can change: forward by a sign of 1, backward by -1."""
    return carry_by(state, sign * state[1])


def iterate(problem: FlowProblem, rules: Rules, samples: Samples) -> None:
    """One iteration of Picard, all decisions on samples included; what is known of them is written over."""
    z = samples.value
    fz = problem(z[0], z[1])
    after, _ = rules.account(samples, z, fz, update_px(z, fz))
    for old, new in zip(tensors(samples), tensors(after), strict=True):
        if old is not new:
            old.copy_(new)


def tensors(samples: Samples) -> list[Tensor]:
    """All of them once: Picard's answer is its last value."""
    flat = [*samples.point, *samples.value, *samples[4:]]
    return [tensor for tensor in flat if isinstance(tensor, Tensor)]


@dataclass(frozen=True)
class Parts:
    """The functions of this module, as they are or compiled.

    :ivar name: of the runtime that they make.
    """

    encode: Callable[[DEQFlow, Tensor], tuple[Encoding, Tensor]] = encode
    move: Callable[[State, Tensor], State] = move
    iterate: Callable[[FlowProblem, Rules, Samples], None] = iterate
    name: str = "graphs"

    @classmethod
    def compiled(cls, **settings: Any) -> Parts:
        """Each compiled for one size of its inputs.

        :param settings: of ``torch.compile``.
        """

        def compiled(part: Function) -> Function:
            return cast(Function, torch.compile(_own(part), dynamic=False, fullgraph=True, **settings))

        return cls(compiled(encode), compiled(move), compiled(iterate), "compiled")


_numbers = itertools.count()


def _own(part: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: PyTorch compiles one code for a few sizes, and refuses further ones."""
    code = part.__code__
    return FunctionType(code.replace(co_name=f"{part.__name__}_{next(_numbers)}"), part.__globals__)
