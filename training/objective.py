# SPDX-License-Identifier: Apache-2.0
"""The losses: of the flow, by sparse fixed-point correction, and of the head that predicts how wrong the flow is."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
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
    solve,
    sparse_correction,
    uniform_positions,
    unroll,
)
from deq_flow_ros.model import FACTOR, DEQFlow, Encoding, FlowProblem, update_px, usable_levels
from deq_flow_ros.model.cells import carry, expected_error, mixture
from deq_flow_ros.model.correlation import CorrelationPyramid
from training.flow_dataset import Clip
from training.settings import CHECKED, Count, Flag, NotNegative, Positive

IMPLICIT_TOLERANCE = 1e-3  # of the adjoint solve; a gradient is noisier than that by far
HIDDEN_SHARE = 0.1  # standard deviation of the noise on the hidden state, relative to its root mean square
KNOTS = (3, 4)  # rows, columns of the smooth noise on the flow
BLANK_SHARE, COARSE_SHARE = 0.25, 0.5  # of the clips that the head sees: texture removed; cold starts coarse to fine
COARSE_LEVELS, COARSE_ITERATIONS = 2, 4
AGAIN, REMEMBERED = 2, 200  # solved states that a step of the head sees again, of so many


@dataclass(frozen=True, config=CHECKED)
class Objective:
    """How a clip becomes a loss."""

    cold_iterations: tuple[Count, Count] = (6, 10)  # range (least, most) from the cold start, drawn per step
    warm_iterations: tuple[Count, Count] = (2, 6)  # the same of the pairs that start from the state of the pair before
    draw: Literal["uniform", "log-uniform"] = "uniform"  # the second gives mostly few, now and then many iterations
    corrections: Count = 3  # states that the loss is taken at, evenly spaced up to the end; one less when warm
    # "phantom-K" (K steps; 1 is the one-step gradient), "phantom-K-TAU" with damping TAU, or "implicit"; one for all
    # corrections, or one for each, separated by commas. With fewer corrections, the last ones count.
    gradient: str = "phantom-1"
    # Instead of all that: unrolled, with the loss at every step and no gradient through the flow from step to step
    # (RAFT, arXiv 2003.12039, section 3.3).
    recurrent: Flag = False
    recompute: Flag = False  # less memory for more time: encoder blocks and lookups run again in the backward pass
    jacobian: NotNegative = 0.0  # weight of the ``jacobian_penalty`` at the last state of a pair
    gamma: NotNegative = 0.8  # weight of an earlier correction relative to the next
    matching: NotNegative = 0.5  # weight of the matching loss: the one-step gradient alone teaches the encoder slowly
    occluded: NotNegative = 0.3  # weight of pixels not seen in the next frame: their flow can only be guessed
    scale_px: Positive = 1.0  # see ``robust``
    perturbation_px: NotNegative = 0.0  # noise on the start of the warm pairs, see ``perturb``

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
        """The loss in px, and what to log: the endpoint error of the cold and of the warm pairs; and ``adjoint``, the
        residual that the backward pass of an implicit gradient ended with.
        """
        batch, frames = clip.images.shape[:2]
        encoding = model.encode(clip.images.flatten(0, 1), self.recompute)
        features, context = (e.unflatten(0, (batch, frames)).unbind(1) for e in encoding)
        encodings = list(map(Encoding, features, context))
        losses, measured = list[Tensor](), dict[str, Tensor]()

        def add(name: str, weight: float, loss: Tensor) -> None:
            losses.append(weight * loss)
            measured[name] = loss.detach()

        start = model.initial_state(encodings[0])
        for t in range(frames - 1):
            iterations = self.draw_iterations(self.warm_iterations if t else self.cold_iterations, rng)
            # An adjoint solve goes through its evaluation again and again, and would look up again each time.
            again = self.recompute and (self.recurrent or "implicit" not in self.gradient)
            problem = model.problem(encodings[t], encodings[t + 1], recompute=again)
            count = max(1, self.corrections - bool(t))
            states = self._states(problem, start, iterations, count, measured)
            visible = clip.valid[:, t] & ~clip.occluded[:, t]
            weights = clip.valid[:, t] * torch.where(visible, 1.0, self.occluded)
            for state, gamma in zip(states, correction_weights(len(states), self.gamma), strict=True):
                error = smooth_error(model.upsample(state), clip.flow[:, t])
                losses.append(gamma * weighted_mean(robust(error, self.scale_px), weights))
            measured["epe_warm" if t else "epe_cold"] = weighted_mean(error.detach(), clip.valid[:, t])
            if self.matching:
                assert isinstance(problem.correlation, CorrelationPyramid)  # as ever where no iterations are named
                add("matching", self.matching, matching_loss(problem.correlation, clip.flow[:, t], visible))
            if self.jacobian:
                add("jacobian", self.jacobian, jacobian_penalty(problem, states[-1]).mean())
            hidden, flow = (tensor.detach() for tensor in states[-1])
            start = carry((hidden, flow))
            if self.perturbation_px and clip.numbers is not None:
                start = perturb(start, [[number, t] for number in clip.numbers.tolist()], self.perturbation_px)
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
        positions = uniform_positions(max(iterations, *steps), count, gap=max(steps))
        last = slice(-len(positions), None)
        return sparse_correction(problem, start, positions, gradient=gradients[last], gradient_steps=steps[last])


def make_gradient(name: str, report: Callable[[Solution], None] | None = None) -> tuple[Gradient, int]:
    """A gradient by its name in ``Objective.gradient``, and the evaluations of ``f`` it makes; else ``ValueError``."""
    found = re.fullmatch(r"implicit|phantom-(\d+)(?:-(\d*\.?\d+))?", name.strip())
    steps, damping = (int(found[1] or 1), float(found[2] or 1)) if found else (0, 1.0)
    if not (steps >= 1 and 0 < damping <= 1):
        raise ValueError(f"unknown gradient {name!r}; expected phantom-K, phantom-K-TAU (0 < TAU <= 1) or implicit")
    if name.strip() == "implicit":
        return partial(implicit_gradient, tolerance=IMPLICIT_TOLERANCE, report=report), 1
    return partial(phantom_gradient, steps=steps, damping=damping), steps


def smooth_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Endpoint error per pixel (B, H, W), px; rounded off at 0.01 px so that the gradient stays bounded."""
    return ((flow - truth).square().sum(1) + 1e-4).sqrt()


def robust(error: Tensor, scale_px: float) -> Tensor:
    """Like the error while it is small, logarithmic beyond ``scale_px`` (which may be infinite)."""
    return error if scale_px == float("inf") else scale_px * torch.log1p(error / scale_px)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over the samples of the weighted mean of each, values and weights (B, ...); 0 where there is no weight."""
    return ((values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1)).mean()


def matching_loss(correlation: CorrelationPyramid, flow: Tensor, visible: Tensor) -> Tensor:
    """Cross entropy of where each visible cell of the first image is found in the second.

    The logits are its similarities with all cells there; the target is shared between the four around position + flow.

    :param flow: (B, 2, H, W) px, true.
    :param visible: (B, H, W) bool, the flow holds and its target is seen in the second image.
    """
    height, width = correlation.volumes[0].shape[3:]
    inside = F.avg_pool2d(visible.float().unsqueeze(1), FACTOR)
    cells = F.avg_pool2d(flow * visible.unsqueeze(1), FACTOR) / inside.clamp_min(1e-6) / FACTOR
    y, x = (torch.arange(n, device=flow.device, dtype=flow.dtype) for n in (height, width))
    target = torch.stack([(x + cells[:, 0]) / (width - 1), (y[:, None] + cells[:, 1]) / (height - 1)], dim=-1)
    log_probability = correlation.volumes[0].view(-1, height * width).float().log_softmax(1).view(-1, 1, height, width)
    places = 2 * target.view(-1, 1, 1, 2) - 1
    found = F.grid_sample(log_probability, places, padding_mode="border", align_corners=True)
    return weighted_mean(-found.view(target.shape[:3]), (inside[:, 0] > 0.5).float())


def perturb(state: State, keys: list[list[int]], strength_px: float) -> State:
    """A warm start, disturbed: a smooth field on the flow as a wrong estimate has, white noise on the hidden state.

    :param state: (hidden (B, C, H, W), flow (B, 2, H, W) in cells).
    :param keys: what the noise of each sample is a function of, whatever batch it is drawn in.
    :param strength_px: standard deviation of the flow's field at its knots, px of the full resolution.
    """
    hidden, flow = state
    fields, noises = [], []
    for key in keys:
        generator = torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))
        fields.append(torch.randn(2, *KNOTS, generator=generator))
        noises.append(torch.randn(hidden.shape[1:], generator=generator))
    field = F.interpolate(torch.stack(fields).to(flow), flow.shape[-2:], mode="bilinear", align_corners=True)
    size = hidden.square().mean((1, 2, 3), keepdim=True).sqrt()
    return hidden + HIDDEN_SHARE * size * torch.stack(noises).to(hidden), flow + strength_px / FACTOR * field


class UncertaintyLoss:
    """The mean negative log likelihood of the flow's error, by which the head that predicts it is trained.

    Solving takes several times as long as a step of the head, so each step also sees ``AGAIN`` of the last
    ``REMEMBERED`` solved states again; with more, the head gets worse on pictures unlike the clips. A resumed run has
    none at first, and so differs from one that was not interrupted.
    """

    def __init__(self) -> None:
        self._states: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=REMEMBERED)

    def __call__(
        self, objective: Objective, model: DEQFlow, clip: Clip, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what to log: mean endpoint error and expected error, px. The head alone gets a gradient."""
        assert model.uncertainty is not None
        before, states = list(self._states), solved_states(objective, model, clip, rng)
        self._states.extend(states)
        if before:
            states += [before[int(place)] for place in rng.integers(len(before), size=AGAIN)]
        losses, errors, expected = [], [], []
        for hidden, error, valid in states:
            parameters = model.uncertainty(hidden.to(model.uncertainty.conv1.weight.dtype))
            losses.append(weighted_mean(negative_log_likelihood(parameters, error.float()), valid))
            errors.append(weighted_mean(error.float().norm(dim=1), valid))
            expected.append(weighted_mean(expected_error(parameters.detach())[:, 0], valid))
        loss, error, expectation = (torch.stack(values).mean() for values in (losses, errors, expected))
        return loss, {"epe": error, "expected": expectation}


@torch.no_grad()
def solved_states(
    objective: Objective, model: DEQFlow, clip: Clip, rng: np.random.Generator
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The pairs of a clip after any number of iterations, so that a flow that has not settled is known as such.

    :returns: of each pair, the hidden state (B, C, H, W) and the flow's error (B, 2, 8 H, 8 W) px, both float16, and
        where the true flow is valid, (B, 8 H, 8 W) bool.
    """
    images = clip.images.float()
    if rng.random() < BLANK_SHARE:
        images = blank(images, rng)
    encodings = [model.encode(images[:, t]) for t in range(images.shape[1])]
    states, state = [], None
    for t in range(images.shape[1] - 1):
        if state is not None:
            start: State = carry(state)
            iterations = objective.draw_iterations(objective.warm_iterations, rng)
        else:
            iterations = objective.draw_iterations(objective.cold_iterations, rng)
            levels = min(COARSE_LEVELS, usable_levels(*images.shape[-2:])) if rng.random() < COARSE_SHARE else 0
            coarse = model.coarse_start(images[:, t], images[:, t + 1], levels, COARSE_ITERATIONS)
            start = coarse or model.initial_state(encodings[t])
        problem = model.problem(encodings[t], encodings[t + 1], iterations=iterations)
        state = solve(problem, start, max_iterations=iterations, measure=update_px, check_start=False).state
        error = model.upsample(state) - clip.flow[:, t]
        states.append((state[0].half(), error.half(), clip.valid[:, t]))
    return states


def negative_log_likelihood(parameters: Tensor, error: Tensor) -> Tensor:
    """Of an error vector per pixel, (B, 2, H, W) px, under the mixture, (B, H, W); up to a constant, log 4."""
    shares, scales = mixture(parameters)
    absolute = error.abs().sum(1, keepdim=True)  # both components have one scale: the product of their densities
    return -torch.logsumexp(shares - 2 * scales - absolute * torch.exp(-scales), 1)


def blank(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (B, T, 3, H, W) RGB 0..255 whose texture is (nearly) gone, in large areas with soft borders or everywhere.

    The true flow is what it was, so that the head learns that it is unknown there.
    """
    batch, _, _, height, width = images.shape
    areas = torch.from_numpy(rng.normal(0, 1, (batch, 1, 3, 4))).to(images)
    areas = F.interpolate(areas, (height, width), mode="bicubic", align_corners=False).unsqueeze(1)
    strength = torch.ones_like(areas) if rng.random() < 0.4 else torch.sigmoid(8 * areas)
    left = float(np.exp(rng.uniform(np.log(1e-3), np.log(0.1)))) * (rng.random() < 0.5)  # of the contrast
    sigma = float(rng.uniform(0, 2)) * (rng.random() < 0.5)
    mean = images.mean((1, 3, 4), keepdim=True)
    noise = torch.from_numpy(rng.normal(0, 1, images.shape)).to(images)
    plain = mean + left * (images - mean) + sigma * noise
    return torch.lerp(images, plain, strength.expand_as(plain)).round().clamp(0, 255)
