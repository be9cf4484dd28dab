# SPDX-License-Identifier: Apache-2.0
"""``FlowEstimator``: frames in, flow out, one at a time, as good as the time allows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from deq_flow_ros.equilibrium import Solution, State, solve
from deq_flow_ros.model import DEQFlow, Encoding, Prepared, crop, pad_to_multiple, rescale, update_px, usable_levels
from deq_flow_ros.model.deq_flow import MIN_SIDE
from deq_flow_ros.streaming.costs import CostModel, ScaleController, StageClock, number_of_pixels, scaled_size
from deq_flow_ros.streaming.scene_cut import Thumbnail
from deq_flow_ros.streaming.warm_start import carry

DIRECTIONS = ("forward", "backward")
# A cold pair is first solved at a half and a quarter of the resolution.
COARSE_LEVELS = 2
COARSE_ITERATIONS = 4
# Share of the budget that is left for what no stage measures: other threads, the scheduler.
RESERVE = 0.05


@dataclass(frozen=True)
class FlowInfo:
    """How one flow field came about.

    :ivar stamp_ns: stamp of the later image.
    :ivar previous_stamp_ns: stamp of the earlier image.
    :ivar direction: "forward": flow on the earlier image's pixels; "backward": on the later one's, pointing back.
    :ivar iterations: evaluations of the update operator (of a cold start, those at the processing scale).
    :ivar stop_reason: "converged", "iterations", "deadline" or "diverged".
    :ivar warm: whether the solve started from the last pair's fixed point.
    :ivar residual_px: RMS of the last update, px of the input; NaN without any iteration.
    :ivar reset_reason: why the stream began anew before this pair; None within a stream.
    :ivar scale: processing scale, 1 is the input's resolution.
    :ivar stage_ms: time by stage since the frame arrived; ``prepare`` is among them where it was not called ahead.
    :ivar latency_ms: from the frame's arrival to its result.
    :ivar budget_ms: what was allowed; None without a budget.
    """

    stamp_ns: int
    previous_stamp_ns: int
    direction: str
    iterations: int
    stop_reason: str
    warm: bool
    residual_px: float
    reset_reason: str | None
    scale: float
    stage_ms: dict[str, float]
    latency_ms: float
    budget_ms: float | None

    @property
    def over_budget(self) -> bool:
        """Whether the result came later than its budget allowed."""
        return self.budget_ms is not None and self.latency_ms > self.budget_ms


@dataclass(frozen=True)
class FlowResult:
    """Flow (H, W, 2) float32 px, x before y; residual (H, W) float32 px: length of the last update; and ``info``."""

    flow: np.ndarray
    residual: np.ndarray
    info: FlowInfo


@dataclass
class _Frame:
    """A frame as the stream remembers it."""

    image: np.ndarray
    stamp_ns: int
    thumbnail: Thumbnail
    scale: float
    pixels: int
    tensor: torch.Tensor
    encoding: Encoding
    padding: tuple[int, int, int, int]


@dataclass
class _Start:
    """Where the next solve starts, and what was made ready for it."""

    state: State | None
    prepared: Prepared | None


class FlowEstimator:
    """Dense flow of a stream of frames under a latency budget.

    Each frame is encoded once. The fixed point of a pair, hidden state and flow, is moved along the motion and is the
    start of the next. Costs are learnt, the solver gets an absolute deadline and stops before it would pass it; when
    not even one iteration fits, the frames are processed at a smaller scale until there is room again.

    One thread at a time.

    :param model: from ``load_model``, on its device.
    :param latency_budget_ms: from a frame's arrival to its result; None for no limit.
    :param max_iterations: per pair, >= 1.
    :param tolerance_px: stop when the RMS update is at or below this, in pixels of the input; None: iterate to the cap.
    :param direction: "forward" (flow on the earlier image's pixels) or "backward" (on the later one's).
    :param min_scale: the smallest processing scale that may be used, in (0, 1].
    :param max_gap_ms: a longer time between two frames starts the stream anew.
    :raises ValueError: for values outside of these.
    """

    def __init__(
        self,
        model: DEQFlow,
        latency_budget_ms: float | None = None,
        max_iterations: int = 12,
        tolerance_px: float | None = 0.05,
        direction: str = "forward",
        min_scale: float = 0.25,
        max_gap_ms: float = 1000.0,
    ) -> None:
        for name, value, ok, expected in (
            ("latency_budget_ms", latency_budget_ms, latency_budget_ms is None or latency_budget_ms > 0, "> 0 or None"),
            ("max_iterations", max_iterations, max_iterations >= 1, ">= 1"),
            ("tolerance_px", tolerance_px, tolerance_px is None or tolerance_px > 0, "> 0 or None"),
            ("direction", direction, direction in DIRECTIONS, f"one of {', '.join(DIRECTIONS)}"),
            ("min_scale", min_scale, 0 < min_scale <= 1, "in (0, 1]"),
            ("max_gap_ms", max_gap_ms, max_gap_ms > 0, "> 0"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        self.model = model
        self.latency_budget_ms = latency_budget_ms
        self.max_iterations = max_iterations
        self.tolerance_px = tolerance_px
        self.direction = direction
        self.min_scale = min_scale
        self.max_gap_ms = max_gap_ms
        self.reset_reason: str | None = "start"
        self._costs = CostModel()
        self._scales = ScaleController(min_scale)
        self._unhurried_scale = 1.0
        self._previous: _Frame | None = None
        self._state: State | None = None
        self._start: _Start | None = None

    def reset(self, reason: str) -> None:
        """Forget the stream (not the learnt costs); the next frame is a first one, for this reason."""
        self.reset_reason = reason
        self._previous = self._state = self._start = None

    def warm_up(self, height: int, width: int) -> None:
        """Learn the costs of frames of this size before the first one comes; leaves no stream behind."""
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        settings = self.latency_budget_ms, self.tolerance_px, self.max_iterations
        self.latency_budget_ms, self.tolerance_px, self.max_iterations = None, None, min(self.max_iterations, 4)
        try:
            for scale in (1.0, self.min_scale):
                self._unhurried_scale = scale
                for pair in range(4):
                    self.reset("warm-up")
                    self.update(noise, 0)
                    self.update(noise, 1)
                    if pair == 0 and self._previous is not None:
                        self._costs.forget(self._previous.pixels)  # it paid for allocations and kernel choices
        finally:
            self._unhurried_scale = 1.0
            self.latency_budget_ms, self.tolerance_px, self.max_iterations = settings
            self.reset("start")

    @torch.inference_mode()
    def update(self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None) -> FlowResult | None:
        """Take the next frame of the stream.

        :param frame: (H, W, 3) uint8 RGB, at least 16x16; kept until the next frame, so not to be written to.
        :param stamp_ns: its time stamp.
        :param arrival_ns: when it arrived, on ``time.monotonic_ns()``; the budget counts from here. None is now.
        :returns: the flow between the last frame and this one, or None if there is no last frame to compare with:
            ``reset_reason`` then says why.
        :raises ValueError: if the frame is not as described; the stream stays as it was.
        """
        arrival_ns = time.monotonic_ns() if arrival_ns is None else arrival_ns
        _check_frame(frame)
        deadline_ns = None
        if self.latency_budget_ms is not None:
            deadline_ns = arrival_ns + round(1e6 * self.latency_budget_ms)
        thumbnail = Thumbnail.of(frame)
        reason = self._discontinuity(frame, stamp_ns, thumbnail)
        if reason is not None:
            self.reset(reason)
        scale = min(self._unhurried_scale, self._scales.highest(*frame.shape[:2]))
        if deadline_ns is not None:
            available_ms = (deadline_ns - time.monotonic_ns()) / 1e6
            scale = self._scales.choose(self._costs, available_ms, *frame.shape[:2])
        clock = StageClock(self.model.device)
        current = self._encode(frame, stamp_ns, thumbnail, scale, clock)
        previous = self._previous
        if previous is None:
            self._previous = current
            return None
        if previous.scale != scale:
            previous = self._change_scale(previous, scale)
        if self._start is None:
            with clock.stage("prepare"):
                self._prepare(previous)
        result = self._solve(previous, current, arrival_ns, deadline_ns, clock)
        self._previous = current
        return result

    @torch.inference_mode()
    def prepare(self) -> None:
        """Do what the next pair needs and its frame does not: to be called when a result is out, before a frame."""
        if self._previous is not None and self._start is None:
            self._prepare(self._previous)

    def _discontinuity(self, frame: np.ndarray, stamp_ns: int, thumbnail: Thumbnail) -> str | None:
        previous = self._previous
        if previous is None:
            return None
        if frame.shape != previous.image.shape:
            (h0, w0), (h1, w1) = previous.image.shape[:2], frame.shape[:2]
            return f"size changed from {w0}x{h0} to {w1}x{h1}"
        elapsed_ms = (stamp_ns - previous.stamp_ns) / 1e6
        if elapsed_ms < 0:
            return f"time went back by {-elapsed_ms:.1f} ms"
        if elapsed_ms == 0:
            return "time stood still: two frames with one stamp"
        if elapsed_ms > self.max_gap_ms:
            return f"gap of {elapsed_ms:.0f} ms, longer than {self.max_gap_ms:.0f} ms"
        if thumbnail.is_cut_from(previous.thumbnail):
            return "scene cut"
        return None

    def _encode(
        self, image: np.ndarray, stamp_ns: int, thumbnail: Thumbnail, scale: float, clock: StageClock
    ) -> _Frame:
        height, width = image.shape[:2]
        size = scaled_size(height, width, scale)
        if size != (height, width):
            with clock.stage("resize"):
                processed = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
        else:
            processed = image
        with clock.stage("encode"):
            # (H, W, 3) seen as (1, 3, H, W) already is the channels_last layout that the convolutions want.
            tensor = torch.from_numpy(np.ascontiguousarray(processed)).to(self.model.device)
            padded, padding = pad_to_multiple(tensor.permute(2, 0, 1)[None].float())
            encoding = self.model.encode(padded)
        return _Frame(image, stamp_ns, thumbnail, scale, number_of_pixels(size), padded, encoding, padding)

    def _change_scale(self, previous: _Frame, scale: float) -> _Frame:
        """The last frame, encoded anew at another scale, and the stream's state resized with it."""
        moved = self._encode(
            previous.image, previous.stamp_ns, previous.thumbnail, scale, StageClock(self.model.device)
        )
        if self._state is not None:
            self._state = rescale(self._state, moved.encoding.context.shape[-2:], scale / previous.scale)
        self._start = None
        return moved

    def _prepare(self, previous: _Frame) -> None:
        state = None if self._state is None else carry(self._state, self.direction)
        # Forward flow lives on the last frame's pixels, whose context is known; backward flow on those of the next.
        prepared = self.model.prepare(previous.encoding) if self.direction == "forward" else None
        self._start = _Start(state, prepared)

    def _solve(
        self, previous: _Frame, current: _Frame, arrival_ns: int, deadline_ns: int | None, clock: StageClock
    ) -> FlowResult:
        first, second = (previous, current) if self.direction == "forward" else (current, previous)
        assert self._start is not None
        warm = self._start.state is not None
        with clock.stage("correlate"):
            problem = self.model.problem(first.encoding, second.encoding, self._start.prepared)
        scale = current.scale
        if deadline_ns is not None and self.latency_budget_ms is not None:
            deadline_ns -= round(1e6 * RESERVE * self.latency_budget_ms)
            deadline_ns -= round(1e6 * self._costs.high(current.pixels, "upsample", "output"))
        z0 = self._start.state or self._cold_start(first, second, deadline_ns, clock)
        with clock.stage("solve"):
            solution = solve(
                problem,
                z0,
                max_iterations=self.max_iterations,
                tolerance=None if self.tolerance_px is None else self.tolerance_px * scale,
                measure=update_px,
                deadline_ns=deadline_ns,
                # A late answer is better than none: a cold state says nothing yet, and at the lowest scale nothing else
                # is left to give way, so the flow would never change again.
                min_iterations=int(not warm or scale == self._scales.lowest(*current.image.shape[:2])),
                iteration_cost_ns=1e6 * self._costs.high(current.pixels, "iteration"),
                check_start=False,  # a stream goes on: a state that is not finite resets it, and the frame says so
            )
        with clock.stage("upsample"):
            flow = crop(self.model.upsample(solution.state), first.padding)
            residual = crop(self.model.upsample_residual(solution), first.padding)
        with clock.stage("output"):
            flow_array = _resize(flow[0].permute(1, 2, 0).cpu().numpy(), current.image.shape[:2])
            residual_array = _resize(residual[0, 0].cpu().numpy(), current.image.shape[:2])
        return self._conclude(solution, flow_array, residual_array, previous, current, warm, arrival_ns, clock)

    def _cold_start(self, first: _Frame, second: _Frame, deadline_ns: int | None, clock: StageClock) -> State:
        """The state to begin with when there is none: from smaller versions of the pair, if there is time."""
        levels = min(COARSE_LEVELS, usable_levels(*first.tensor.shape[-2:]))
        if levels and deadline_ns is not None:
            needed_ms = self._costs.high(first.pixels, "coarse", "iteration")
            if time.monotonic_ns() + 1e6 * needed_ms > deadline_ns:
                levels = 0
        if levels:
            with clock.stage("coarse"):
                state = self.model.coarse_start(first.tensor, second.tensor, levels, COARSE_ITERATIONS)
            assert state is not None
            return state
        return self.model.initial_state(first.encoding)

    def _conclude(
        self,
        solution: Solution,
        flow: np.ndarray,
        residual: np.ndarray,
        previous: _Frame,
        current: _Frame,
        warm: bool,
        arrival_ns: int,
        clock: StageClock,
    ) -> FlowResult:
        """Measure, learn, remember."""
        stage_ms, iterations = clock.read(), int(solution.iterations)
        self._costs.add(current.pixels, stage_ms, solution.evaluations)
        stop_reason = solution.stop_reasons[0].value
        info = FlowInfo(
            stamp_ns=current.stamp_ns,
            previous_stamp_ns=previous.stamp_ns,
            direction=self.direction,
            iterations=iterations,
            stop_reason=stop_reason,
            warm=warm,
            residual_px=float(solution.residual) / current.scale if iterations else float("nan"),
            reset_reason=self.reset_reason,
            scale=current.scale,
            stage_ms=stage_ms,
            latency_ms=(time.monotonic_ns() - arrival_ns) / 1e6,
            budget_ms=self.latency_budget_ms,
        )
        self.reset_reason = None
        self._start = None
        if stop_reason == "diverged":
            self._state, self.reset_reason = None, "the state was not finite"
        else:
            self._state = solution.state
        return FlowResult(flow, residual, info)


def _resize(field: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A flow (h, w, 2) or residual (h, w), in pixels of its own resolution, at another resolution in pixels of that."""
    height, width = field.shape[:2]
    if (height, width) == size:
        return np.ascontiguousarray(field)
    resized = cv2.resize(field, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    ratio = np.array([size[1] / width, size[0] / height], np.float32)
    return resized * (ratio if field.ndim == 3 else ratio.mean())


def _check_frame(frame: np.ndarray) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"a frame must be a uint8 array of shape (H, W, 3), got {got}")
    if min(frame.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"a frame must be at least {MIN_SIDE}x{MIN_SIDE} pixels, got {frame.shape[1]}x{frame.shape[0]}"
        )
