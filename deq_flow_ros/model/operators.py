# SPDX-License-Identifier: Apache-2.0
"""The interface of update operators, their registry, and the weight normalisation of those that train with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deq_flow_ros.equilibrium import State
from deq_flow_ros.model.architecture import Architecture
from deq_flow_ros.model.update import GmaUpdate, RaftUpdate

# Names of a convolution's parametrised tensors in a state dict: the magnitude (C, 1, 1, 1) and the direction.
MAGNITUDE = "parametrizations.weight.original0"
DIRECTION = "parametrizations.weight.original1"

# What an operator computes from the context. Only the operator itself reads it.
Prepared = Any


class UpdateOperator(Protocol):
    """One step of the fixed-point iteration. It is also an ``nn.Module``, made from an ``Architecture``.

    All maps are at 1/8 of the resolution and have the shape (B, C, H, W). ``a`` stands for the architecture.
    """

    def prepare(self, context: Tensor) -> Prepared:
        """Compute everything that does not change between iterations. It runs once per pair, possibly ahead of time.

        :param context: (B, a.context_dim, H, W), the context of the image on whose pixels the flow is defined.
        """

    def __call__(self, hidden: Tensor, flow: Tensor, correlation: Tensor, prepared: Prepared) -> State:
        """The next hidden state and flow.

        The same arguments must give the same result. An operator with memory between calls has no fixed point.

        :param hidden: (B, a.hidden_dim, H, W).
        :param flow: (B, 2, H, W) float32, x before y, in cells of 8 px.
        :param correlation: (B, a.correlation_dim, H, W), looked up around ``flow``.
        :param prepared: what ``prepare`` returned.
        :returns: tensors with the shapes of ``hidden`` and ``flow``.
        """


Factory = Callable[[Architecture], UpdateOperator]
AnyFactory = TypeVar("AnyFactory", bound=Factory)

ENTRY_POINTS = "deq_flow_ros.update_operators"
UPDATE_OPERATORS: dict[str, Factory] = {"raft": RaftUpdate, "gma": GmaUpdate}


def register_update_operator(name: str) -> Callable[[AnyFactory], AnyFactory]:
    """Class decorator that registers an update operator under the name used in ``Architecture.update``.

    It has to run before a model with that operator is made or loaded, unless a package names the class as an entry
    point of the group ``deq_flow_ros.update_operators``: then the operator is found by its name.

    :raises ValueError: if the name is taken.
    """
    if name in UPDATE_OPERATORS:
        raise ValueError(f"there is an update operator {name!r} already: {UPDATE_OPERATORS[name]!r}")

    def register(factory: AnyFactory) -> AnyFactory:
        UPDATE_OPERATORS[name] = factory
        return factory

    return register


def make_update_operator(architecture: Architecture) -> UpdateOperator:
    """The operator of an architecture, weight-normalised if the architecture says so.

    :raises ValueError: for a name that is not registered.
    :raises TypeError: for an operator that is not an ``nn.Module``.
    """
    name = architecture.update
    if name not in UPDATE_OPERATORS:
        for entry_point in entry_points(group=ENTRY_POINTS, name=name):
            factory = entry_point.load()  # loading may already register the operator
            UPDATE_OPERATORS.setdefault(name, factory)
    if name not in UPDATE_OPERATORS:
        raise ValueError(
            f"unknown update operator {name!r}; expected one of {', '.join(UPDATE_OPERATORS)}. If it is one of your "
            f"own, import the module that registers it first, or install it as an entry point of {ENTRY_POINTS!r}"
        )
    operator = UPDATE_OPERATORS[name](architecture)
    if not isinstance(operator, nn.Module):
        raise TypeError(f"update operator {name!r} must make a torch.nn.Module, it made {type(operator)}")
    if architecture.weight_norm:
        add_weight_norm(operator)
    return operator


def add_weight_norm(operator: nn.Module) -> None:
    """Parametrise every convolution of an operator, except in modules with the attribute ``weight_norm = False``.

    Each filter is then a magnitude times a direction (arXiv 1602.07868), which keeps the iterated function well-behaved
    during training.
    """
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
