# SPDX-License-Identifier: Apache-2.0
"""The thread that computes: takes the newest frame of each camera in fair turns, on a GPU those of all together."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from deq_flow_ros.ros.camera_stream import Attempt, CameraStream, ReceivedFrame
from deq_flow_ros.ros.window import SUPERSEDED
from deq_flow_ros.ros.worker import FairWorker
from deq_flow_ros.streaming import FlowResult, update_together

DELIVERING_NS = 1_000_000_000
"""A camera that delivered an image within this time takes its share of the budget."""
HANDOVER_S = 5e-5
"""Pause of the executor's thread after handing over a frame: without one it keeps Python's lock while it gets ready for
the next message, and the worker begins that much later (0.7 ms instead of 0.2)."""
START_TIMEOUT_S = 10.0
FRESH_NS = 5_000_000
"""A frame that has waited for longer may have newer ones behind it, and they come first: no pause then."""


class FrameWorker(FairWorker[ReceivedFrame]):
    """Runs the estimators of `cameras`, one model's, on `device`, from its construction to `stop`.

    :ivar latency_budget_ms: of each camera; 0 is none.
    """

    def __init__(self, cameras: Sequence[CameraStream], device: torch.device, latency_budget_ms: float) -> None:
        self.latency_budget_ms = latency_budget_ms
        self._cameras = cameras
        self._on_gpu = device.type == "cuda"
        super().__init__(self.process, "flow", together=self._on_gpu)
        # OpenMP's number of threads is each thread's own: oneDNN would else take all cores until this one's first
        # parallel operation of PyTorch's own.
        threads = torch.get_num_threads()
        self.call(lambda: torch.set_num_threads(threads), START_TIMEOUT_S)

    def take(self, frame: ReceivedFrame) -> None:
        """Put a frame in its camera's place; one that still waited there is dropped."""
        replaced = self.submit(frame.camera.name, frame)
        if replaced is not None:
            replaced.camera.drop(replaced, SUPERSEDED)
        if time.monotonic_ns() - frame.arrival_ns < FRESH_NS:
            time.sleep(HANDOVER_S)

    def drop_waiting(self, reason: str) -> None:
        """Drop the frames that no turn has come to."""
        for frame in self.withdraw():
            frame.camera.drop(frame, reason)

    def process(self, frames: Sequence[ReceivedFrame]) -> None:
        """From message to published flow: frames of different cameras. Each has its account afterwards."""
        try:
            self._compute(frames)
        except Exception as error:
            for frame in frames:
                frame.camera.give_up(frame, error)

    def _compute(self, frames: Sequence[ReceivedFrame]) -> None:
        limit_ms = self.time_limit_ms([frame.camera for frame in frames])
        begun = (frame.camera.begin(frame, limit_ms) for frame in frames)
        attempts = [attempt for attempt in begun if attempt is not None]
        for attempt, result in self._update(attempts):
            attempt.frame.camera.finish(attempt, result)
        for attempt in attempts:
            # Not at the cost of another camera's frame that waits.
            if len(self._cameras) == 1 or self.idle:
                attempt.frame.camera.prepare()

    def time_limit_ms(self, whose: Sequence[CameraStream]) -> float | None:
        """Time that a turn of these cameras may take: its share of the budget, while others deliver images as well."""
        now_ns = time.monotonic_ns()
        delivering = [
            camera for camera in self._cameras if camera in whose or now_ns - camera.last_arrival_ns < DELIVERING_NS
        ]
        shares = len(delivering)
        if self._on_gpu:  # frames of one size share a turn
            shares = len({camera.last_shape for camera in delivering})
        return self.latency_budget_ms / shares if shares > 1 and self.latency_budget_ms else None

    def _update(self, attempts: Sequence[Attempt]) -> list[tuple[Attempt, FlowResult | None]]:
        """Run the estimators; a frame that fails has its account and is left out."""
        try:
            results = update_together([attempt.request for attempt in attempts])
            return list(zip(attempts, results, strict=True))
        except Exception as error:
            if len(attempts) == 1:
                attempts[0].frame.camera.fail(attempts[0].frame, error)
                return []
            # Whose frame it was is not known, so each stream starts anew, and each frame is tried alone.
            for attempt in attempts:
                attempt.frame.camera.recover(error)
            return [done for attempt in attempts for done in self._update([attempt])]
