# SPDX-License-Identifier: Apache-2.0
"""``FlowEstimator`` computes the flow of a stream of frames, as well as the time and the device allow."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from deq_flow_ros.host import versions
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import batch
from deq_flow_ros.streaming.clock import MACHINE, Clock
from deq_flow_ros.streaming.eager import EagerEngine, Slot
from deq_flow_ros.streaming.graph_engine import GraphEngine
from deq_flow_ros.streaming.interface import LARGEST_SCALE, EstimatorSettings, FlowResult
from deq_flow_ros.streaming.plan import scaled_size
from deq_flow_ros.streaming.stream import Stream

RUNTIMES = ("auto", "eager", "graphs", "compiled")
CACHE = "TORCHINDUCTOR_CACHE_DIR"
COMPILERS = ("gcc", "cc", "clang")

LOG = logging.getLogger(__name__)
# Estimators of one model, clock and runtime have one engine, so that their frames can be a batch of it.
_engines: WeakValueDictionary[tuple[int, int, str], EagerEngine] = WeakValueDictionary()


def choose_runtime(runtime: str, device: str | torch.device) -> tuple[str, str]:
    """The name of a runtime, out of ``RUNTIMES`` without "auto": the one asked for, or the fastest that there is.

    "eager" calls PyTorch's operations one by one, "graphs" replays captured CUDA graphs of them, and "compiled" graphs
    of compiled parts.

    :returns: and why it is not a faster one, if this installation is the reason; else "".
    :raises ValueError: for a name that is none, or one that the device cannot have.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"expected a runtime out of {', '.join(RUNTIMES)}, got {runtime!r}")
    if torch.device(device).type != "cuda":
        if runtime not in ("auto", "eager"):
            raise ValueError(f"the runtime {runtime} needs a CUDA device, got {str(device)!r}; expected auto or eager")
        return "eager", ""
    if runtime in ("eager", "graphs"):
        return runtime, ""
    missing = _why_not_compiled()
    return ("graphs", f"not compiled: {missing}") if missing else ("compiled", "")


def _why_not_compiled() -> str:
    """What of PyTorch's compiler for GPUs is missing here; "" if it is all there."""
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA builds for Linux on x86-64 and Arm (pip: triton)"
    if not hasattr(torch.compiler, "is_compiling"):
        return f"PyTorch {torch.__version__} is too old for it"
    if not any(shutil.which(name) for name in (*os.environ.get("CC", "").split()[:1], *COMPILERS)):
        return f"no C compiler, which Triton needs for its launchers; install one of {', '.join(COMPILERS)}, or set CC"
    return ""


def keep_compiled_code(device: torch.device) -> Path | None:
    """Let PyTorch keep compiled code for the next start, apart for each version and card; where it does.

    In ``$TORCHINDUCTOR_CACHE_DIR`` if that is set, else in ``$XDG_CACHE_HOME/deq_flow_ros`` or
    ``~/.cache/deq_flow_ros``; None where that cannot be written to, and PyTorch takes a folder for temporary files.
    """
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = f"{versions().get('deq_flow_ros', 'source')}_torch-{torch.__version__}_{card}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = root / "deq_flow_ros" / "compiled" / re.sub(r"[^\w.+-]+", "_", name)
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(f"{place} cannot be written to")
    except OSError as error:
        LOG.warning("compiled code is not kept: %s", error)
        return None
    os.environ[CACHE] = str(place)
    return place


def _engine_of(model: DEQFlow, clock: Clock, runtime: str) -> EagerEngine:
    """The engine that all streams of a model share; it lives as long as somebody has it."""
    name, reason = choose_runtime(runtime, model.device)
    key, compiled = (id(model), id(clock), name), name == "compiled"
    if (engine := _engines.get(key)) is None:
        if reason:
            LOG.warning("%s", reason)
        if compiled:
            keep_compiled_code(model.device)
        made = EagerEngine(model, clock) if name == "eager" else GraphEngine(model, clock, None, compiled, note=reason)
        engine = _engines[key] = made
    return engine


class FlowEstimator:
    """Dense flow of a stream of frames under a latency budget.

    Each frame is encoded once. The fixed point of a pair (hidden state and flow) is moved along the motion and becomes
    the start of the next solve, which stops before an absolute deadline. If not even one iteration fits by the costs
    that were learnt, frames are processed at a smaller scale until there is time again.

    Only one thread at a time may use the estimators of a model.

    :param model: a model from ``load_model``, which several estimators may share; or an engine, which has a clock.
    :param clock: the clock for deadlines and latencies; None: the clock of the machine.
    :param runtime: see ``choose_runtime``; not used with an engine.
    :param settings: settings of ``EstimatorSettings`` by name, such as ``latency_budget_ms=50``.
    :ivar engine: computes the flow; it has the ``model`` and the ``clock``.
    :ivar stream: decides what is computed.
    :raises ValueError: for unknown settings, values outside of their range, or a runtime that the device cannot run.
    """

    def __init__(
        self, model: DEQFlow | EagerEngine, clock: Clock | None = None, runtime: str = "auto", **settings: Any
    ) -> None:
        if isinstance(model, (str, Path)):
            raise ValueError(f"expected a model, got its name: write FlowEstimator(load_model({str(model)!r}))")
        self.engine = model if isinstance(model, EagerEngine) else _engine_of(model, clock or MACHINE, runtime)
        self.model, self.clock = self.engine.model, self.engine.clock
        self.stream = Stream(self._checked(EstimatorSettings().changed(**settings)), self.model.max_pixels, Slot())

    @property
    def settings(self) -> EstimatorSettings:
        """The present settings."""
        return self.stream.settings

    @property
    def reset_reason(self) -> str | None:
        """Why the next pair starts anew, or why the stream did with its last frame; None within a stream."""
        return self.stream.reset_reason

    @property
    def left_out(self) -> str | None:
        """Why the last frame was left out of the stream (it was sent twice or came late); None if it was not."""
        return self.stream.left_out

    def change(self, **settings: Any) -> None:
        """Change some settings. The stream goes on, unless the direction changes.

        :raises ValueError: for unknown settings, or values outside of their range; then none is changed.
        """
        self.stream.change(self._checked(self.settings.changed(**settings)))

    def _checked(self, settings: EstimatorSettings) -> EstimatorSettings:
        if settings.uncertainty and self.model.uncertainty is None:
            cure = "python -m training.train --recipe uncertainty --init WEIGHTS adds one"
            raise ValueError(f"uncertainty must be False with these weights, which have no head for it; {cure}")
        return settings

    def reset(self, reason: str) -> None:
        """Forget the stream, but not the learnt costs. The next frame is a first one, with this reason."""
        self.stream.reset(reason)

    def warm_up(self, height: int, width: int) -> None:
        """Learn the costs of frames of this size before the first one comes. Afterwards there is no stream.

        :raises ValueError: for a size that no frame may have.
        """
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        batch.UpdateRequest(self, noise, 0)  # refuses a size that no frame may have
        ladder, settings = self.stream.ladder((height, width)), self.settings
        for scale in sorted({ladder[0], ladder[-1], *(s for s in ladder if s == 1)}, reverse=True):
            fixed, size = min(scale, LARGEST_SCALE), scaled_size(height, width, scale)  # small frames are enlarged more
            trial = FlowEstimator(
                self.engine, min_scale=fixed, max_scale=fixed, tolerance_px=None, direction=settings.direction,
                max_iterations=min(settings.max_iterations, 4), warm=settings.warm, uncertainty=settings.uncertainty,
                refinement=settings.refinement,
            )  # fmt: skip
            trial.stream.costs = self.stream.costs
            self.engine.make_ready((height, width), size)
            for pair in range(4):
                trial.reset("warm-up")
                trial.update(noise, 0)
                trial.update(noise, 1)
                if pair == 0:  # its time includes allocations and the choice of kernels
                    self.stream.costs.stages.pop(math.prod(size), None)
        self.reset("start")

    def take_costs_of(self, other: FlowEstimator) -> None:
        """Copy the costs that another estimator of the same model has learnt, instead of a warm-up."""
        self.stream.costs = copy.deepcopy(other.stream.costs)

    def update(
        self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None, time_limit_ms: float | None = None
    ) -> FlowResult | None:
        """Process the next frame of the stream.

        :param frame: (H, W, 3) uint8 RGB, at least 16x16. It is copied, so its memory may be used for the next one.
        :param stamp_ns: its time stamp, an integer in nanoseconds.
        :param arrival_ns: when it arrived, on ``clock.now_ns()``, from when the budget counts. None: now.
        :param time_limit_ms: the longest time from now on, whatever the budget allows, which is kept in the same way;
            None: only the budget holds.
        :returns: the flow between the last frame and this one. None if the frame is left out because its stamp is not
            later than the last one; then ``left_out`` says so, and the stream is unchanged. None also if there is no
            last frame; then ``reset_reason`` says why.
        :raises ValueError: if the frame, a time or the limit is not as described; the stream is unchanged.
        """
        own = frame.copy() if isinstance(frame, np.ndarray) else frame
        return batch.update_together([batch.UpdateRequest(self, own, stamp_ns, arrival_ns, time_limit_ms)])[0]

    def prepare(self) -> None:
        """Compute ahead what does not depend on the next frame. Call it after a result, while waiting for a frame."""
        last = self.stream.last
        if last is not None and not self.stream.ahead:
            self.engine.stages.begin(math.prod(scaled_size(*last.seen.size, last.scale)))
            self.engine.prepare(self.stream.slot, self.settings.direction)
            self.stream.ahead = True

    def snapshot(self) -> dict[str, np.ndarray]:
        """The present state of the stream for a bug report, as copies on the CPU.

        After the first frame, it has ``image2`` (H, W, 3) uint8 RGB, ``stamp2_ns`` and ``scale``. After a pair, it also
        has ``image1``, ``stamp1_ns``, the start of the solve, ``start_hidden`` (C, h, w) and ``start_flow`` (2, h, w),
        its end, ``hidden`` and ``flow`` (unless it diverged), and the ``likeness`` of the images at the flow, -1..1.
        Flow is float32, in cells of 8 px of the processed image.

        :returns: arrays by name; empty without a stream.
        """
        stream, last = self.stream, self.stream.last
        if last is None:
            return {}
        arrays = {"image2": last.image.copy(), "stamp2_ns": np.array(last.seen.stamp_ns, np.int64)}
        arrays["scale"] = np.array(last.scale)
        if stream.likeness is not None:
            arrays["likeness"] = np.array(stream.likeness)
        if last.before is not None:
            arrays |= {"image1": last.before[0].copy(), "stamp1_ns": np.array(last.before[1], np.int64)}
        return arrays | self.engine.snapshot(stream.slot)
