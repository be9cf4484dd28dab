# SPDX-License-Identifier: Apache-2.0
"""``FlowEstimator``: frames in, flow out, as good as the time allows."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from deq_flow_ros.equilibrium import State
from deq_flow_ros.model import DEQFlow, Prepared, rescale
from deq_flow_ros.streaming.clock import MACHINE, Clock
from deq_flow_ros.streaming.continuity import Seen
from deq_flow_ros.streaming.costs import CostModel, ScaleController, StageClock, number_of_pixels, scaled_size
from deq_flow_ros.streaming.frames import EncodedImage, encode_images, sample
from deq_flow_ros.streaming.pairs import Pair, SolvedPairs
from deq_flow_ros.streaming.result import FlowInfo, FlowResult
from deq_flow_ros.streaming.settings import EstimatorSettings
from deq_flow_ros.streaming.together import StreamFrame, UpdateRequest, update_together
from deq_flow_ros.streaming.warm_start import MIN_LIKENESS, MIN_OF_LAST, MIN_OF_STILL, carry, likeness


@dataclass(frozen=True)
class _Previous:
    """A frame as the stream remembers it."""

    encoded: EncodedImage
    seen: Seen


@dataclass(frozen=True)
class _Start:
    """Where the next solve starts, and what was made ready for it."""

    state: State | None
    prepared: Prepared | None


@dataclass(frozen=True)
class _Solved:
    """What the last solve began with, beside the frame that is still there; for ``snapshot``."""

    earlier_image: np.ndarray
    earlier_stamp_ns: int
    start: State


class _LearntUnpickler(pickle.Unpickler):
    """Knows nothing but what is learnt: a file may come from anywhere, and pickles can do anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "deque"):
            return super().find_class(module, name)
        if module in (CostModel.__module__, ScaleController.__module__):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:  # not what is merely imported there
                return found
        raise pickle.UnpicklingError(f"expected what an estimator has learnt, got {module}.{name}")


class FlowEstimator:
    """Dense flow of a stream of frames under a latency budget.

    Each frame is encoded once. The fixed point of a pair, hidden state and flow, is moved along the motion and is the
    start of the next. Costs are learnt, the solver gets an absolute deadline and stops before it would pass it; when
    not even one iteration fits, the frames are processed at a smaller scale until there is room again.

    One thread at a time.

    :param model: from ``load_model``, on its device. Several estimators may share it.
    :param clock: what deadlines and latencies are measured by; None is the machine's.
    :param settings: those of ``EstimatorSettings``, by name: ``latency_budget_ms=50``.
    :raises ValueError: for settings that are none, or outside of their range.
    """

    def __init__(self, model: DEQFlow, clock: Clock | None = None, **settings: Any) -> None:
        self.model = model
        self.clock = MACHINE if clock is None else clock
        self.reset_reason: str | None = "start"
        self._settings = self._checked(EstimatorSettings().changed(**settings))
        self._costs = CostModel()
        self._scales = self._controller(self._settings.min_scale, self._settings.max_scale)
        self._previous: _Previous | None = None
        self._state: State | None = None
        self._start: _Start | None = None
        self._solved: _Solved | None = None
        self._likeness: float | None = None
        self._unlike = False

    @property
    def settings(self) -> EstimatorSettings:
        """As they are now."""
        return self._settings

    def change(self, **settings: Any) -> None:
        """Go on with other settings: all of those named, or none of them if they are refused.

        The stream goes on as well, at another scale if the limits demand it; only another direction, in which the last
        fixed point means something else, starts it anew.

        :raises ValueError: for settings that are none, or outside of their range.
        """
        before, self._settings = self._settings, self._checked(self._settings.changed(**settings))
        now = self._settings
        self._scales.limit(now.min_scale, now.max_scale)
        if now.direction != before.direction and self._previous is not None:
            self.reset(f"direction changed from {before.direction} to {now.direction}")

    def _checked(self, settings: EstimatorSettings) -> EstimatorSettings:
        if settings.uncertainty and self.model.uncertainty is None:
            raise ValueError(
                "uncertainty must be False with these weights, which have no head for it; python -m training.train "
                "--recipe uncertainty --init WEIGHTS adds one"
            )
        return settings

    def reset(self, reason: str) -> None:
        """Forget the stream (not the learnt costs); the next frame is a first one, for this reason."""
        self.reset_reason = reason
        self._previous = self._state = self._start = self._solved = self._likeness = None

    def warm_up(self, height: int, width: int) -> None:
        """Learn the costs of frames of this size before the first one comes; leaves no stream behind."""
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        settings, scales = self._settings, self._scales
        ladder = scales.ladder(height, width)
        try:
            for scale in sorted({ladder[0], ladder[-1], *(s for s in ladder if s == 1)}, reverse=True):
                self._settings = replace(
                    settings, latency_budget_ms=None, tolerance_px=None, max_iterations=min(settings.max_iterations, 4)
                )
                self._scales = self._controller(scale, scale)
                for pair in range(4):
                    self.reset("warm-up")
                    self.update(noise, 0)
                    self.update(noise, 1)
                    if pair == 0 and self._previous is not None:
                        # It paid for allocations and kernel choices.
                        self._costs.forget(self._previous.encoded.pixels)
        finally:
            self._settings, self._scales = settings, scales
            self.reset("start")

    def take_costs_of(self, other: FlowEstimator) -> None:
        """Know what another estimator of the same model has learnt, in place of a warm-up of one's own."""
        self._costs = copy.deepcopy(other._costs)

    def update(
        self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None, time_limit_ms: float | None = None
    ) -> FlowResult | None:
        """Take the next frame of the stream.

        :param frame: (H, W, 3) uint8 RGB, at least 16x16; kept until the next pair, so not to be written to.
        :param stamp_ns: its time stamp.
        :param arrival_ns: when it arrived, on ``clock.now_ns()``; the budget counts from here. None is now.
        :param time_limit_ms: take no longer than this from now on, whatever the budget allows; None: the budget alone.
            It is kept as the budget is, and shortened as it is: fewer iterations first, then a smaller scale.
        :returns: the flow between the last frame and this one, or None if there is no last frame to compare with:
            ``reset_reason`` then says why.
        :raises ValueError: if frame or limit are not as described; the stream stays as it was.
        """
        return update_together([UpdateRequest(self, frame, stamp_ns, arrival_ns, time_limit_ms)])[0]

    @torch.inference_mode()
    def prepare(self) -> None:
        """Do what the next pair needs and its frame does not: to be called when a result is out, before a frame."""
        if self._previous is not None and self._start is None:
            with self.clock.stages(self.model.device, self._previous.encoded.pixels).stage("prepare"):
                self._prepare(self._previous)

    def snapshot(self) -> dict[str, np.ndarray]:
        """The stream as it stands, for a bug report; copies, on the CPU.

        After the first frame ``image2`` (H, W, 3) uint8 RGB, ``stamp2_ns`` and ``scale``. After a pair also ``image1``,
        ``stamp1_ns``, where its solve started, ``start_hidden`` (C, h, w) and ``start_flow`` (2, h, w), and where it
        ended, ``hidden`` and ``flow`` (unless it diverged); the flow in cells of 8 px of the processed image, float32;
        and ``likeness`` of its images, -1..1, that of the next is compared with.

        :returns: by name; empty without a stream.
        """
        if self._previous is None:
            return {}
        frame, solved = self._previous, self._solved
        arrays = {
            "image2": frame.encoded.image.copy(),
            "stamp2_ns": np.array(frame.seen.stamp_ns, np.int64),
            "scale": np.array(frame.encoded.scale),
        }
        if self._likeness is not None:
            arrays["likeness"] = np.array(self._likeness)
        states = {"": self._state}
        if solved is not None:
            arrays["image1"] = solved.earlier_image.copy()
            arrays["stamp1_ns"] = np.array(solved.earlier_stamp_ns, np.int64)
            states["start_"] = solved.start
        for prefix, state in states.items():
            if state is not None:
                for name, tensor in zip(("hidden", "flow"), state, strict=True):
                    arrays[prefix + name] = tensor[0].float().cpu().numpy().copy()
        return arrays

    @torch.inference_mode()
    def restore(self, arrays: Mapping[str, np.ndarray], reset_reason: str | None = None) -> None:
        """Go on with the stream of a ``snapshot`` of an estimator with the same model and settings.

        What was learnt of costs is not part of it: see ``learnt``.

        :param reset_reason: that of the estimator when the snapshot was taken.
        """
        self.reset("restored")
        self.reset_reason = reset_reason
        if not arrays:
            return
        image, self._scales.scale = arrays["image2"], float(arrays["scale"])
        encoded = self._encode(image, self._scales.scale)
        self._previous = _Previous(encoded, Seen.of(image, int(arrays["stamp2_ns"])))
        self._likeness = float(arrays["likeness"]) if "likeness" in arrays else None
        if "hidden" in arrays:
            hidden, flow = (torch.from_numpy(arrays[name])[None].to(self.model.device) for name in ("hidden", "flow"))
            self._state = hidden.to(encoded.encoding.context.dtype), flow

    def learnt(self) -> bytes:
        """What was learnt of costs, and where the processing scale stands; for ``learn``, of this version only."""
        return pickle.dumps((self._costs, self._scales))

    def learn(self, learnt: bytes) -> None:
        """Go on with what an estimator with the same model and settings had ``learnt``.

        :raises ValueError: if it is anything else; the estimator stays as it was.
        """
        try:
            costs, scales = _LearntUnpickler(io.BytesIO(learnt)).load()
        except Exception as error:  # what is no pickle, or a damaged one, raises nearly anything
            raise ValueError(f"expected what an estimator has learnt, got bytes that are not: {error}") from error
        if not isinstance(costs, CostModel) or not isinstance(scales, ScaleController):
            got = f"{type(costs).__name__} and {type(scales).__name__}"
            raise ValueError(f"expected what an estimator has learnt, CostModel and ScaleController, got {got}")
        self._costs, self._scales = costs, scales

    def _controller(self, min_scale: float, max_scale: float) -> ScaleController:
        return ScaleController(min_scale, max_scale, max_pixels=self.model.max_pixels)

    # The steps of an update, taken by ``together``.

    def _discontinuity(self, frame: StreamFrame) -> str | None:
        """Why this frame does not continue the stream; None if it does, or if there is none."""
        if self._previous is None:
            return None
        return frame.seen.break_after(self._previous.seen, self._settings.max_gap_ms)

    def _choose_scale(self, frame: StreamFrame, batch_size: int) -> float:
        height, width = frame.image.shape[:2]
        if frame.deadline is None:
            return self._scales.ladder(height, width)[0]
        left_ms = frame.deadline.left_ms(self.clock.now_ns())
        return self._scales.choose(self._costs.of_batch(batch_size), left_ms, height, width)

    def _remember(self, frame: StreamFrame, encoded: EncodedImage) -> None:
        self._previous = _Previous(encoded, frame.seen)

    def _pair(self, current: EncodedImage, batch_size: int, stages: StageClock) -> Pair:
        """The last frame and this one, at one scale, ready to be solved."""
        assert self._previous is not None
        previous = self._previous
        if previous.encoded.scale != current.scale:
            previous = self._previous = self._at_scale(previous, current.scale)
        if self._start is None:
            with stages.stage("prepare"):
                self._prepare(previous, carry_only=batch_size > 1)
        assert self._start is not None
        first, second = previous.encoded, current
        if self._settings.direction == "backward":
            first, second = second, first
        if self._settings.warm:
            with stages.stage("match"):
                self._judge(first, second)
        return Pair(first, second, self._start.state, self._start.prepared)

    def _judge(self, first: EncodedImage, second: EncodedImage) -> None:
        """Start cold where the last motion is no start for this pair; nor is this one, then, if its images are unlike.

        Behind a cut that its colours do not give away a warm start would be far worse than a cold one.
        """
        start = self._start
        assert start is not None
        features = first.encoding.features, second.encoding.features
        context = first.encoding.context
        still = likeness(context.new_zeros((1, 2, *context.shape[-2:]), dtype=torch.float32), *features)
        carried = still if start.state is None else likeness(start.state[1], *features)
        alike, last = max(still, carried), self._likeness
        self._likeness = alike
        self._unlike = last is not None and last > MIN_LIKENESS and alike < MIN_OF_LAST * last
        misled = still > MIN_LIKENESS and carried < MIN_OF_STILL * still
        if start.state is not None and (self._unlike or misled):
            self._state, self._start = None, replace(start, state=None)
            self.reset_reason = "the motion so far does not explain this frame"

    def _is_cold(self) -> bool:
        return self._state is None

    def _is_lowest(self, encoded: EncodedImage) -> bool:
        """Whether its scale could not be smaller."""
        return encoded.scale <= self._scales.ladder(*encoded.image.shape[:2])[-1]

    def _at_scale(self, previous: _Previous, scale: float) -> _Previous:
        """The last frame, encoded anew at another scale, and the stream's state resized with it."""
        encoded = self._encode(previous.encoded.image, scale)
        if self._state is not None:
            size = encoded.encoding.context.shape[-2:]
            self._state = rescale(self._state, size, scale / previous.encoded.scale)
        self._start = self._likeness = None  # of another scale, with which nothing compares
        return replace(previous, encoded=encoded)

    def _encode(self, image: np.ndarray, scale: float) -> EncodedImage:
        height, width = image.shape[:2]
        pixels = number_of_pixels(scaled_size(height, width, scale))
        return encode_images(self.model, [image], scale, self.clock.stages(self.model.device, pixels))[0]

    def _prepare(self, previous: _Previous, carry_only: bool = False) -> None:
        direction = self._settings.direction
        state = None if self._state is None else carry(self._state, direction)
        # Forward flow lives on the last frame's pixels, whose context is known; backward flow on those of the next.
        ahead = direction == "forward" and not carry_only
        self._start = _Start(state, self.model.prepare(previous.encoded.encoding) if ahead else None)

    def _conclude(
        self, frame: StreamFrame, encoded: EncodedImage, solved: SolvedPairs, place: int, stage_ms: dict[str, float]
    ) -> FlowResult:
        """Measure, learn, remember: of the pair at a place in its batch."""
        previous, start, settings = self._previous, self._start, self._settings
        assert previous is not None and start is not None
        solution, batch_size = solved.solution, len(solved.flows)
        self._costs.of_batch(batch_size).add(encoded.pixels, stage_ms, solution.evaluations)
        iterations, stop_reason = int(solution.iterations[place]), solution.stop_reasons[place].value
        info = FlowInfo(
            stamp_ns=frame.request.stamp_ns,
            previous_stamp_ns=previous.seen.stamp_ns,
            direction=settings.direction,
            iterations=iterations,
            stop_reason=stop_reason,
            warm=start.state is not None,
            residual_px=float(solution.residual[place]) / encoded.scale if iterations else float("nan"),
            reset_reason=self.reset_reason,
            scale=encoded.scale,
            stage_ms=stage_ms,
            latency_ms=(self.clock.now_ns() - frame.arrival_ns) / 1e6,
            budget_ms=settings.latency_budget_ms,
            time_limit_ms=frame.request.time_limit_ms,
            batch_size=batch_size,
        )
        least = solution.evaluations <= 1 and "coarse" not in stage_ms and self._is_lowest(encoded)
        info = replace(info, starved=info.over_budget and least)
        self._solved = _Solved(previous.encoded.image, previous.seen.stamp_ns, solved.starts[place])
        self._remember(frame, encoded)
        self._start = self.reset_reason = None
        self._state = sample(solution.state, place) if settings.warm else None
        if self._unlike:
            self._state, self.reset_reason = None, "the frame before was too unlike the one before it"
        if stop_reason == "diverged":
            self._state, self.reset_reason = None, "the state was not finite"
        uncertainty = solved.uncertainties[place] if settings.uncertainty and solved.uncertainties else None
        return FlowResult(solved.flows[place], solved.residuals[place], info, uncertainty)
