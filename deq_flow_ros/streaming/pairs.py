# SPDX-License-Identifier: Apache-2.0
"""From pairs of encoded images to their flow: any number of pairs of one processed size, as one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from deq_flow_ros.equilibrium import Solution, State, solve
from deq_flow_ros.model import DEQFlow, Encoding, Prepared, crop, update_px, usable_levels
from deq_flow_ros.streaming.clock import Clock
from deq_flow_ros.streaming.costs import StageClock
from deq_flow_ros.streaming.frames import EncodedImage, joined, resize_field, sample

# A cold pair is first solved at a half and a quarter of the resolution: of its own, however much it is enlarged.
COARSE_LEVELS = 2
COARSE_ITERATIONS = 4
# What the kind of correlation is chosen for: a stream makes few iterations, whatever is allowed. Not what happens to
# fit the budget, so that the same images give the same flow.
LOOKUPS = 4


@dataclass(frozen=True)
class Pair:
    """Two images, and where the solve starts.

    :ivar first: the image on whose pixels the flow lives.
    :ivar state: the last fixed point, carried along; None starts cold.
    :ivar prepared: ``model.prepare(first.encoding)``, if it was done ahead; used where the pair is alone in its batch.
    """

    first: EncodedImage
    second: EncodedImage
    state: State | None
    prepared: Prepared | None


@dataclass(frozen=True)
class Limits:
    """When the solve of a batch ends.

    :ivar tolerance: of the RMS update, in pixels of what is processed; None: only the other limits end it.
    :ivar clock: of the deadline.
    :ivar deadline_ns: on ``clock.now_ns()``; what follows the solve must still fit before the frames' own.
    :ivar min_iterations: to make whatever the deadline says.
    :ivar iteration_ms: expected cost of one.
    :ivar coarse_ms: expected cost of the coarse solves of a cold start.
    """

    clock: Clock
    max_iterations: int
    tolerance: float | None
    deadline_ns: int | None
    min_iterations: int
    iteration_ms: float
    coarse_ms: float


@dataclass(frozen=True)
class SolvedPairs:
    """What ``solve_pairs`` found.

    :ivar starts: the state at which each pair's solve started.
    :ivar flows: (H, W, 2) float32 px per pair, at the resolution of its images as they came.
    :ivar residuals: (H, W) float32 px, likewise.
    :ivar uncertainties: the same, expected endpoint error; None if it was not asked for.
    """

    solution: Solution
    starts: list[State]
    flows: list[np.ndarray]
    residuals: list[np.ndarray]
    uncertainties: list[np.ndarray] | None


def solve_pairs(
    model: DEQFlow, pairs: Sequence[Pair], limits: Limits, stages: StageClock, uncertainty: bool = False
) -> SolvedPairs:
    """Solve pairs of one processed size as one batch; each sample stops for itself, the deadline is that of all.

    :param uncertainty: also find the expected error of each pixel; the model has a head for it.
    """
    first, second = (
        Encoding(*map(joined, zip(*encodings, strict=True)))
        for encodings in ([pair.first.encoding for pair in pairs], [pair.second.encoding for pair in pairs])
    )
    prepared = pairs[0].prepared
    if len(pairs) > 1:
        # What was prepared for each pair alone cannot be joined: only the update operator knows what is in it.
        with stages.stage("prepare"):
            prepared = model.prepare(first)
    with stages.stage("correlate"):
        problem = model.problem(first, second, prepared, iterations=min(limits.max_iterations, LOOKUPS))
    starts = _starts(model, pairs, limits, stages)
    with stages.stage("solve"):
        solution = solve(
            stages.counted(problem),
            tuple(map(joined, zip(*starts, strict=True))),
            max_iterations=limits.max_iterations,
            tolerance=limits.tolerance,
            measure=update_px,
            deadline_ns=limits.deadline_ns,
            now_ns=limits.clock.now_ns,
            min_iterations=limits.min_iterations,
            iteration_cost_ns=1e6 * limits.iteration_ms,
            check_start=False,  # a stream goes on: a state that is not finite resets it, and the frame says so
        )
    with stages.stage("upsample"):
        flow = model.upsample(solution.state)
        residual = model.upsample_residual(solution)
        expected = model.upsample_uncertainty(solution.state) if uncertainty else None
    with stages.stage("output"):
        flows = _fields(flow, pairs)
        residuals = _fields(residual[:, 0], pairs)
        uncertainties = None if expected is None else _fields(expected[:, 0], pairs)
    return SolvedPairs(solution, starts, flows, residuals, uncertainties)


def _fields(values: Tensor, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """Per pair, (H, W, 2) or (H, W) px of its images as they came, of (B, 2, h, w) or (B, h, w) px as processed."""
    values = values.cpu()
    fields = []
    for value, pair in zip(values, pairs, strict=True):
        value = crop(value, pair.first.padding)
        field = (value.permute(1, 2, 0) if value.dim() == 3 else value).numpy()
        fields.append(resize_field(field, pair.first.image.shape[:2]))
    return fields


def _starts(model: DEQFlow, pairs: Sequence[Pair], limits: Limits, stages: StageClock) -> list[State]:
    """Where each pair's solve starts; a cold one from smaller versions of the pair, if there is time."""
    cold = [i for i, pair in enumerate(pairs) if pair.state is None]
    starts = [pair.state or model.initial_state(pair.first.encoding) for pair in pairs]
    enlarged = max(0, round(math.log2(pairs[0].first.scale)))
    levels = min(COARSE_LEVELS + enlarged, usable_levels(*pairs[0].first.tensor.shape[-2:]))
    if not cold or not levels:
        return starts
    if limits.deadline_ns is not None:
        needed_ms = limits.coarse_ms + limits.iteration_ms
        if limits.clock.now_ns() + 1e6 * needed_ms > limits.deadline_ns:
            return starts
    with stages.stage("coarse"):
        image1 = joined([pairs[i].first.tensor for i in cold])
        image2 = joined([pairs[i].second.tensor for i in cold])
        state = model.coarse_start(image1, image2, levels, COARSE_ITERATIONS)
    assert state is not None
    for place, i in enumerate(cold):
        starts[i] = sample(state, place)
    return starts
