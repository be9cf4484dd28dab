# SPDX-License-Identifier: Apache-2.0
"""The loss: sparse fixed-point correction on the pairs of a clip, the first cold, the others warm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import correction_weights, phantom_gradient, sparse_correction
from deq_flow_ros.model import DEQFlow, Encoding
from deq_flow_ros.streaming.warm_start import carry
from training.rendering import Clip


@dataclass(frozen=True)
class Objective:
    """How a clip becomes a loss.

    :ivar cold_iterations: range (least, most) of Picard iterations from the cold start; drawn per step, so that the
        fixed point and not one particular count is learnt. The loss is taken half-way and at the end.
    :ivar warm_iterations: the same for the pairs that start from the state of the pair before; loss at the end.
    :ivar gradient_steps: k of the phantom gradient; 1 is the one-step gradient.
    :ivar gamma: weight of the earlier correction relative to the later.
    """

    cold_iterations: tuple[int, int] = (6, 10)
    warm_iterations: tuple[int, int] = (2, 6)
    gradient_steps: int = 1
    gamma: float = 0.8

    def loss(self, model: DEQFlow, clip: Clip, rng: np.random.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss in px, and what to log: the endpoint error of the cold and of the warm pairs."""
        batch, frames = clip.images.shape[:2]
        encoding = model.encode(clip.images.flatten(0, 1))
        features, context = (e.unflatten(0, (batch, frames)) for e in encoding)
        encodings = [Encoding(features[:, t], context[:, t]) for t in range(frames)]
        losses, epe = [], {}
        start = model.initial_state(encodings[0])
        for t in range(frames - 1):
            least, most = self.warm_iterations if t else self.cold_iterations
            end = int(rng.integers(max(least, self.gradient_steps), most + 1))
            positions = [end] if t or end < 2 * self.gradient_steps else [end // 2, end]
            states = sparse_correction(
                model.problem(encodings[t], encodings[t + 1]),
                start,
                positions,
                gradient=partial(phantom_gradient, steps=self.gradient_steps),
                gradient_steps=self.gradient_steps,
            )
            errors = [endpoint_error(model.upsample(state), clip.flow[:, t], clip.valid[:, t]) for state in states]
            losses += [w * e for w, e in zip(correction_weights(len(errors), self.gamma), errors, strict=True)]
            epe["warm" if t else "cold"] = errors[-1].detach()
            start = tuple(tensor.detach() for tensor in states[-1])
            with torch.no_grad():
                start = carry((start[0], start[1]))
        return torch.stack(losses).sum(), epe


def endpoint_error(flow: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Mean Euclidean distance over the valid pixels, px; rounded off at 0.01 px so that the gradient stays bounded."""
    error = ((flow - truth).square().sum(1) + 1e-4).sqrt()
    return (error * valid).sum() / valid.sum().clamp_min(1)


def iteration_range(text: Sequence[int]) -> tuple[int, int]:
    """Check a (least, most) pair from the command line."""
    least, most = text
    if not 1 <= least <= most:
        raise ValueError(f"a range of iterations must be 1 <= least <= most, got {least} {most}")
    return least, most
