# SPDX-License-Identifier: Apache-2.0
"""The loss: sparse fixed-point correction on the pairs of a clip, the first cold, the others warm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from deq_flow_ros.equilibrium import (
    Gradient,
    Solution,
    State,
    correction_weights,
    implicit_gradient,
    jacobian_penalty,
    phantom_gradient,
    sparse_correction,
    uniform_positions,
    unroll,
)
from deq_flow_ros.model import FACTOR, DEQFlow, Encoding, FlowProblem
from deq_flow_ros.model.correlation import CorrelationPyramid
from deq_flow_ros.streaming.warm_start import carry
from training.rendering import Clip
from training.settings import CHECKED, Count, Flag, NotNegative, Positive, Share

IMPLICIT_TOLERANCE = 1e-3  # of the adjoint solve; a gradient is noisier than that by far
HIDDEN_SHARE = 0.1  # standard deviation of the noise on the hidden state, relative to its root mean square
RANDOM_FLOW_PX = (1.0, 64.0)  # range of the standard deviation of a random start's flow, log-uniform
KNOTS = (3, 4)  # rows, columns of the smooth noise on the flow


@dataclass(frozen=True, config=CHECKED)
class Objective:
    """How a clip becomes a loss.

    :ivar cold_iterations: range (least, most) of iterations from the cold start, drawn per step.
    :ivar warm_iterations: the same for the pairs that start from the state of the pair before.
    :ivar draw: how they are drawn: "uniform", or "log-uniform", which gives mostly few, now and then many.
    :ivar corrections: states on the way that the loss is taken at, evenly spaced up to the end; one less when warm.
    :ivar gradient: "phantom-K" (K steps; 1 is the one-step gradient), "phantom-K-TAU" with damping TAU, or "implicit";
        one for all corrections, or one for each, separated by commas; with fewer corrections, the last ones count.
    :ivar recurrent: instead of all that, unrolled, with the loss at every step and no gradient through the flow from
        step to step (RAFT, arXiv 2003.12039, section 3.3).
    :ivar recompute: less memory for more time: encoder blocks and lookups run again in the backward pass.
    :ivar jacobian: weight of the penalty on the Jacobian at the last state of a pair (``jacobian_penalty``).
    :ivar gamma: weight of an earlier correction relative to the next.
    :ivar matching: weight of the matching loss: the one-step gradient alone teaches the encoder slowly.
    :ivar occluded: weight of the pixels that are not seen in the next frame: their flow can only be guessed.
    :ivar consistency: weight of the distance of the states on the way from the end state, see ``consistency_loss``.
    :ivar scale_px: see ``robust``.
    :ivar perturbation_px: noise on the start of the warm pairs of generated clips, see ``perturb``.
    :ivar random_start: share of the cold starts of generated clips that are random states, see ``random_start``.
    """

    cold_iterations: tuple[Count, Count] = (6, 10)
    warm_iterations: tuple[Count, Count] = (2, 6)
    draw: Literal["uniform", "log-uniform"] = "uniform"
    corrections: Count = 3
    gradient: str = "phantom-1"
    recurrent: Flag = False
    recompute: Flag = False
    jacobian: NotNegative = 0.0
    gamma: NotNegative = 0.8
    matching: NotNegative = 0.5
    occluded: NotNegative = 0.3
    consistency: NotNegative = 0.0
    scale_px: Positive = 1.0
    perturbation_px: NotNegative = 0.0
    random_start: Share = 0.0

    def __post_init__(self) -> None:
        for least, most in (self.cold_iterations, self.warm_iterations):
            if least > most:
                raise ValueError(f"a range of iterations must be 1 <= least <= most, got {least} {most}")
        given = len(self.gradient.split(","))
        if given not in (1, self.corrections):
            raise ValueError(f"expected one gradient, or one for each of {self.corrections} corrections, got {given}")
        for name in self.gradient.split(","):
            make_gradient(name)

    def loss(self, model: DEQFlow, clip: Clip, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in px, and what to log: the endpoint error of the cold and of the warm pairs.

        With an implicit gradient, the backward pass adds ``adjoint``, the residual that its solve ended with.
        """
        batch, frames = clip.images.shape[:2]
        encoding = model.encode(clip.images.flatten(0, 1), self.recompute)
        features, context = (e.unflatten(0, (batch, frames)) for e in encoding)
        encodings = [Encoding(features[:, t], context[:, t]) for t in range(frames)]
        losses: list[Tensor] = []
        measured: dict[str, Tensor] = {}

        def add(name: str, weight: float, loss: Tensor) -> None:
            losses.append(weight * loss)
            measured[name] = loss.detach()

        start = model.initial_state(encodings[0])
        if self.random_start and clip.numbers is not None:
            keys = [[number, frames] for number in clip.numbers.tolist()]
            start = random_start((start[0], start[1]), keys, self.random_start)
        for t in range(frames - 1):
            iterations = self.draw_iterations(self.warm_iterations if t else self.cold_iterations, rng)
            # An adjoint solve goes through its evaluation again and again, and would look up again each time.
            again = self.recompute and (self.recurrent or "implicit" not in self.gradient)
            problem = model.problem(encodings[t], encodings[t + 1], recompute=again)
            corrections = max(1, self.corrections - bool(t))
            states = self._states(problem, start, iterations, corrections, measured)
            visible = clip.valid[:, t] & ~clip.occluded[:, t]
            weights = clip.valid[:, t] * torch.where(visible, 1.0, self.occluded)
            for state, gamma in zip(states, correction_weights(len(states), self.gamma), strict=True):
                error = smooth_error(model.upsample(state), clip.flow[:, t])
                losses.append(gamma * weighted_mean(robust(error, self.scale_px), weights))
            measured["epe_warm" if t else "epe_cold"] = weighted_mean(error.detach(), clip.valid[:, t])
            if self.consistency and len(states) > 1:
                add("consistency", self.consistency, consistency_loss(states, clip.valid[:, t], self.scale_px))
            if self.matching:
                assert isinstance(problem.correlation, CorrelationPyramid)  # as ever where no iterations are named
                add("matching", self.matching, matching_loss(problem.correlation, clip.flow[:, t], visible))
            if self.jacobian:
                add("jacobian", self.jacobian, jacobian_penalty(problem, states[-1]).mean())
            start = tuple(tensor.detach() for tensor in states[-1])
            with torch.no_grad():
                start = carry((start[0], start[1]))
                if self.perturbation_px and clip.numbers is not None:
                    keys = [[number, t] for number in clip.numbers.tolist()]
                    start = perturb(start, keys, self.perturbation_px)
        return torch.stack(losses).sum(), measured

    def draw_iterations(self, limits: tuple[int, int], rng: np.random.Generator) -> int:
        """A number of iterations within limits, least and most, drawn as ``draw`` says."""
        least, most = limits
        if self.draw == "uniform":
            return int(rng.integers(least, most + 1))
        # Each count n gets the share of [n, n + 1) on a logarithmic axis.
        return min(most, int(np.exp(rng.uniform(np.log(least), np.log(most + 1)))))

    def _states(
        self, problem: FlowProblem, start: State, iterations: int, count: int, measured: dict[str, Tensor]
    ) -> list[State]:
        """The states to take the loss at; the number of iterations is raised to what the gradients need."""
        if self.recurrent:
            return unroll(problem, start, iterations, detached=(1,))

        def report(solution: Solution) -> None:
            measured["adjoint"] = solution.residual.mean()

        gradients, steps = zip(*(make_gradient(name, report) for name in self.gradient.split(",")), strict=True)
        if len(gradients) == 1:
            gradients, steps = gradients * count, steps * count
        iterations = max(iterations, *steps)
        positions = uniform_positions(iterations, count, gap=max(steps))
        return sparse_correction(
            problem, start, positions, gradient=gradients[-len(positions) :], gradient_steps=steps[-len(positions) :]
        )


def make_gradient(name: str, report: Callable[[Solution], None] | None = None) -> tuple[Gradient, int]:
    """A gradient by its name in ``Objective.gradient``, and the evaluations of ``f`` it makes; else ``ValueError``.

    :param report: see ``implicit_gradient``.
    """
    kind, *numbers = name.strip().split("-")
    try:
        if kind == "implicit" and not numbers:
            return partial(implicit_gradient, tolerance=IMPLICIT_TOLERANCE, report=report), 1
        if kind == "phantom" and len(numbers) in (1, 2):
            steps, damping = int(numbers[0]), float(numbers[1]) if len(numbers) == 2 else 1.0
            if steps >= 1 and 0 < damping <= 1:
                return partial(phantom_gradient, steps=steps, damping=damping), steps
    except ValueError:
        pass
    raise ValueError(f"unknown gradient {name!r}; expected phantom-K, phantom-K-TAU (0 < TAU <= 1) or implicit")


def smooth_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Endpoint error per pixel (B, H, W), px; rounded off at 0.01 px so that the gradient stays bounded."""
    return ((flow - truth).square().sum(1) + 1e-4).sqrt()


def robust(error: Tensor, scale_px: float) -> Tensor:
    """Like the error while it is small, logarithmic beyond ``scale_px`` (which may be infinite)."""
    return error if scale_px == float("inf") else scale_px * torch.log1p(error / scale_px)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over the samples of the weighted mean of each, values and weights (B, ...); 0 where there is no weight."""
    return ((values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1)).mean()


def consistency_loss(states: Sequence[State], valid: Tensor, scale_px: float) -> Tensor:
    """Mean robust distance in px of the flow of all states but the last from that of the last, which gets no gradient.

    Few iterations should be near what many give (after arXiv 2602.03024).

    :param states: two or more.
    :param valid: (B, H, W) bool, the pixels that count.
    """
    weights = F.avg_pool2d(valid.float().unsqueeze(1), FACTOR)[:, 0]
    end = states[-1][1].detach()
    distances = [robust(smooth_error(FACTOR * state[1], FACTOR * end), scale_px) for state in states[:-1]]
    return torch.stack([weighted_mean(distance, weights) for distance in distances]).mean()


def matching_loss(correlation: CorrelationPyramid, flow: Tensor, visible: Tensor) -> Tensor:
    """Cross entropy of where each visible cell of the first image is found in the second.

    The logits are its similarities with all cells there; the target is shared between the four around position + flow.

    :param flow: (B, 2, H, W) px, true.
    :param visible: (B, H, W) bool, the flow holds and its target is seen in the second image.
    """
    similarities, height, width = correlation.levels[0]
    inside = F.avg_pool2d(visible.float().unsqueeze(1), FACTOR)
    cells = F.avg_pool2d(flow * visible.unsqueeze(1), FACTOR) / inside.clamp_min(1e-6) / FACTOR
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
    target_x, target_y = x + cells[:, 0], y + cells[:, 1]
    x0, y0 = target_x.floor(), target_y.floor()
    log_probability = similarities.float().log_softmax(1)
    loss = torch.zeros_like(target_x)
    for dx, weight_x in ((0, 1 - (target_x - x0)), (1, target_x - x0)):
        for dy, weight_y in ((0, 1 - (target_y - y0)), (1, target_y - y0)):
            index = (y0 + dy).clamp(0, height - 1) * width + (x0 + dx).clamp(0, width - 1)
            found = log_probability.gather(1, index.long().view(-1, 1)).view_as(loss)
            loss = loss - weight_x * weight_y * found
    return weighted_mean(loss, (inside[:, 0] > 0.5).float())


def perturb(state: State, keys: list[list[int]], strength_px: float) -> State:
    """A warm start, disturbed: a smooth field on the flow as a wrong estimate has, white noise on the hidden state.

    :param state: (hidden (B, C, H, W), flow (B, 2, H, W) in cells).
    :param keys: what the noise of each sample is a function of, whatever batch or process it is drawn in.
    :param strength_px: standard deviation of the flow's field at its knots, px of the full resolution.
    """
    hidden, flow = state
    noise, field = _noise(state, keys)
    return hidden + HIDDEN_SHARE * _size(hidden) * noise, flow + strength_px / FACTOR * field


def random_start(state: State, keys: list[list[int]], share: float) -> State:
    """Cold starts, a ``share`` of them replaced by noise and a smooth flow (Equilibrium Reasoners, arXiv 2605.21488).

    :param state, keys: as for ``perturb``.
    """
    hidden, flow = state
    noise, field = _noise(state, keys)
    draws = [np.random.default_rng([*key, 1]) for key in keys]
    chosen = torch.tensor([float(rng.random() < share) for rng in draws]).to(flow).view(-1, 1, 1, 1)
    strength = torch.tensor([float(np.exp(rng.uniform(*np.log(RANDOM_FLOW_PX)))) for rng in draws]).to(flow)
    random = strength.view(-1, 1, 1, 1) / FACTOR * field
    return torch.lerp(hidden, _size(hidden) * noise, chosen.to(hidden)), torch.lerp(flow, random, chosen)


def _noise(state: State, keys: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """White noise in the shape of the hidden state, and a smooth field in that of the flow, both of unit variance."""
    hidden, flow = state
    fields, noises = [], []
    for key in keys:
        generator = torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))
        fields.append(torch.randn(2, *KNOTS, generator=generator))
        noises.append(torch.randn(hidden.shape[1:], generator=generator))
    field = F.interpolate(torch.stack(fields).to(flow), flow.shape[-2:], mode="bilinear", align_corners=True)
    return torch.stack(noises).to(hidden), field


def _size(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.square().mean((1, 2, 3), keepdim=True).sqrt()
