# SPDX-License-Identifier: Apache-2.0
"""Update operators: one step of the fixed-point iteration, (hidden, flow) -> (hidden, flow), and their registry.

Modules and attributes have the names of the keys in the released checkpoints (``convz1``, ``to_v``, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_flow_ros.equilibrium import State
from deq_flow_ros.model.architecture import Architecture
from deq_flow_ros.model.cells import is_compiling
from deq_flow_ros.model.weight_norm import add_weight_norm

Prepared = Any  # what an operator computes from the context; only the operator itself reads it


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


class MotionEncoder(nn.Module):
    """Computes motion features from the correlation around the flow and the flow itself, which is appended to them."""

    def __init__(self, correlation_dim: int, widths: tuple[int, int, int, int], motion_dim: int) -> None:
        super().__init__()
        c1, c2, f1, f2 = widths
        self.convc1 = nn.Conv2d(correlation_dim, c1, 1)
        self.convc2 = nn.Conv2d(c1, c2, 3, padding=1)
        self.convf1 = nn.Conv2d(2, f1, 7, padding=3)
        self.convf2 = nn.Conv2d(f1, f2, 3, padding=1)
        self.conv = nn.Conv2d(c2 + f2, motion_dim - 2, 3, padding=1)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        # In one layout with the rest; otherwise every convolution after it would change the layout of all of its input.
        flow = flow.to(correlation.dtype, memory_format=torch.channels_last)
        c = F.relu(self.convc2(F.relu(self.convc1(correlation), inplace=True)), inplace=True)
        f = F.relu(self.convf2(F.relu(self.convf1(flow), inplace=True)), inplace=True)
        return torch.cat((F.relu(self.conv(torch.cat((c, f), 1))), flow), 1)


class Gates(NamedTuple):
    """Weights and context terms of one direction of the separable GRU, prepared for a pair of images."""

    weight_zr: Tensor
    weight_q: Tensor
    context_zr: Tensor
    context_q: Tensor
    padding: tuple[int, int]


class SeparableConvGRU(nn.Module):
    """Convolutional GRU, 1x5 then 5x1 (RAFT, arXiv 2003.12039, section 3.3).

    :param motion_dim: channels of all inputs that change in each iteration, without the hidden state.
    """

    def __init__(self, hidden_dim: int, context_dim: int, motion_dim: int) -> None:
        super().__init__()
        self.hidden_dim, self.context_dim = hidden_dim, context_dim
        inputs = hidden_dim + context_dim + motion_dim
        for suffix, kernel, padding in (("1", (1, 5), (0, 2)), ("2", (5, 1), (2, 0))):
            for gate in "zrq":
                self.add_module(f"conv{gate}{suffix}", nn.Conv2d(inputs, hidden_dim, kernel, padding=padding))

    def prepare(self, context: Tensor) -> list[Gates]:
        """Compute everything that does not change between iterations.

        Convolution is linear in its input channels, so the contribution of the context is computed once per pair
        instead of in every iteration. The gates z and r have the same input, so they become one convolution.
        """
        gates, h, c = [], self.hidden_dim, self.hidden_dim + self.context_dim
        for suffix in "12":
            convolutions: list[Any] = [getattr(self, f"conv{gate}{suffix}") for gate in "zrq"]
            weight, bias = (torch.cat([getattr(each, name) for each in convolutions]) for name in ("weight", "bias"))
            padding = convolutions[0].padding
            fixed = F.conv2d(context, weight[:, h:c], bias, padding=padding)
            moving = torch.cat((weight[:, :h], weight[:, c:]), 1).contiguous(memory_format=torch.channels_last)
            gates.append(Gates(moving[: 2 * h], moving[2 * h :], fixed[:, : 2 * h], fixed[:, 2 * h :], padding))
        return gates

    def forward(self, hidden: Tensor, motion: Tensor, gates: list[Gates]) -> Tensor:
        for gate in gates:
            zr = F.conv2d(torch.cat((hidden, motion), 1), gate.weight_zr, padding=gate.padding)
            z, r = zr.add_(gate.context_zr).sigmoid_().chunk(2, 1)
            q = F.conv2d(torch.cat((r * hidden, motion), 1), gate.weight_q, padding=gate.padding)
            hidden = hidden.lerp(_tanh(q.add_(gate.context_q)), z)
        return hidden


def _tanh(x: Tensor) -> Tensor:
    """``tanh``; for inference on a CPU by ``sigmoid``, which PyTorch computes several times faster there."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or is_compiling():
        return x.tanh_()
    return x.float().mul_(2).sigmoid_().mul_(2).sub_(1).to(x.dtype)


class FlowHead(nn.Module):
    """Computes an increment of the flow from the hidden state."""

    def __init__(self, hidden_dim: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_dim, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        increment: Tensor = self.conv2(F.relu(self.conv1(hidden)))
        return increment


class RaftUpdate(nn.Module):
    """Motion encoder, GRU and flow head (RAFT, arXiv 2003.12039, section 3.3)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.encoder = MotionEncoder(a.correlation_dim, a.motion_widths, a.motion_dim)
        self.gru = SeparableConvGRU(a.hidden_dim, a.context_dim, a.motion_dim)
        self.flow_head = FlowHead(a.hidden_dim, a.flow_head_dim)

    def prepare(self, context: Tensor) -> list[Gates]:
        return self.gru.prepare(context)

    def forward(self, hidden: Tensor, flow: Tensor, correlation: Tensor, prepared: list[Gates]) -> State:
        hidden = self.gru(hidden, self.encoder(correlation, flow), prepared)
        return hidden, flow + self.flow_head(hidden)


class Attention(nn.Module):
    """How much each position attends to each other one, by the context alone (GMA, arXiv 2104.02409, section 3.2)."""

    # It runs once per pair, outside of the iterated function, so it is not normalised (nor is it in the release).
    weight_norm = False

    def __init__(self, context_dim: int) -> None:
        super().__init__()
        self.scale = context_dim**-0.5
        self.to_qk = nn.Conv2d(context_dim, 2 * context_dim, 1, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H * W, H * W), whose rows sum to 1: 92 MB in float32 for 640x480 px."""
        query, key = self.to_qk(context).flatten(2).chunk(2, 1)
        attention = torch.bmm(self.scale * query.transpose(1, 2), key).softmax(2)
        # Under autocast the softmax is float32. Every iteration uses the result, so it is cast once, here.
        return attention.to(query.dtype)


class Aggregate(nn.Module):
    """``motion + gamma * attention @ value(motion)``; ``gamma`` is learnt, starting at zero."""

    def __init__(self, motion_dim: int) -> None:
        super().__init__()
        self.to_v = nn.Conv2d(motion_dim, motion_dim, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, motion: Tensor, attention: Tensor) -> Tensor:
        value = self.to_v(motion).flatten(2).transpose(1, 2)
        # (B, H * W, C) viewed as (B, C, H, W) is channels_last, like all tensors here.
        aggregated = torch.bmm(attention, value).transpose(1, 2).view(motion.shape)
        return motion + self.gamma * aggregated


class GmaUpdate(nn.Module):
    """``RaftUpdate`` with global motion aggregation (GMA, arXiv 2104.02409).

    A pixel that is occluded in the other image cannot be matched, but probably moves as pixels that look similar do.
    The GRU therefore also receives the motion features of all positions, weighted by the similarity of their contexts.
    """

    all_pairs = True  # memory grows with all pairs of cells; ``DEQFlow.max_pixels`` depends on it

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.encoder = MotionEncoder(a.correlation_dim, a.motion_widths, a.motion_dim)
        self.attention = Attention(a.context_dim)
        self.gma = Aggregate(a.motion_dim)
        self.gru = SeparableConvGRU(a.hidden_dim, a.context_dim, 2 * a.motion_dim)
        self.flow_head = FlowHead(a.hidden_dim, a.flow_head_dim)

    def prepare(self, context: Tensor) -> tuple[list[Gates], Tensor]:
        return self.gru.prepare(context), self.attention(context)

    def forward(self, hidden: Tensor, flow: Tensor, correlation: Tensor, prepared: tuple[list[Gates], Tensor]) -> State:
        gates, attention = prepared
        motion = self.encoder(correlation, flow)
        hidden = self.gru(hidden, torch.cat((motion, self.gma(motion, attention)), 1), gates)
        return hidden, flow + self.flow_head(hidden)


Factory = TypeVar("Factory", bound=Callable[[Architecture], UpdateOperator])
ENTRY_POINTS = "deq_flow_ros.update_operators"
UPDATE_OPERATORS: dict[str, Callable[[Architecture], UpdateOperator]] = {"raft": RaftUpdate, "gma": GmaUpdate}


def register_update_operator(name: str) -> Callable[[Factory], Factory]:
    """Class decorator that registers an update operator under the name used in ``Architecture.update``.

    It has to run before a model with that operator is made or loaded, unless a package names the class as an entry
    point of the group ``ENTRY_POINTS``: then the operator is found by its name.

    :raises ValueError: if the name is taken.
    """
    if name in UPDATE_OPERATORS:
        raise ValueError(f"there is an update operator {name!r} already: {UPDATE_OPERATORS[name]!r}")

    def register(factory: Factory) -> Factory:
        UPDATE_OPERATORS[name] = factory
        return factory

    return register


def make_update_operator(architecture: Architecture) -> UpdateOperator:
    """The operator of an architecture, weight-normalised if the architecture says so.

    :raises ValueError: for a name that is not registered; ``TypeError`` for an operator that is no ``nn.Module``.
    """
    name = architecture.update
    if name not in UPDATE_OPERATORS:
        for entry_point in entry_points(group=ENTRY_POINTS, name=name):
            UPDATE_OPERATORS.setdefault(name, entry_point.load())  # loading may already register the operator
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
