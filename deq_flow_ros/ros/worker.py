# SPDX-License-Identifier: Apache-2.0
"""The thread that computes: takes the newest frame of each camera in fair turns, on a GPU those of all together."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import torch

from deq_flow_ros.ros.accounts import SUPERSEDED
from deq_flow_ros.ros.camera import Attempt, Camera
from deq_flow_ros.ros.messages import ReceivedFrame
from deq_flow_ros.streaming import FlowResult, update_together

Result = TypeVar("Result")
Turn: TypeAlias = tuple[Camera, ReceivedFrame]

DELIVERING_NS = 1_000_000_000
"""A camera that delivered an image within this time takes its share of the budget."""
HANDOVER_S = 5e-5
"""Pause of the executor's thread after handing over a frame: without one it keeps Python's lock while it gets ready for
the next message, and the worker begins that much later (0.7 ms instead of 0.2)."""
START_TIMEOUT_S = 10.0
FRESH_NS = 5_000_000
"""A frame that has waited for longer may have newer ones behind it, and they come first: no pause then."""


class FrameWorker:
    """Runs the estimators of ``cameras``, one model's, on ``device``, from its construction to ``stop``.

    Each camera has room for one waiting frame: under overload flow is late by one round at most, instead of by a queue.
    The camera served longest ago goes first, so that one that floods takes no turn of another. On a GPU the waiting
    frames of all cameras are one turn. ``latency_budget_ms`` is that of each camera; 0 is none.
    """

    def __init__(self, cameras: Sequence[Camera], device: torch.device, latency_budget_ms: float) -> None:
        self.latency_budget_ms = latency_budget_ms
        self._cameras, self._on_gpu = cameras, device.type == "cuda"
        self._lock = threading.Lock()
        self._waiting: dict[str, Turn] = {}
        self._order = [camera.name for camera in cameras]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flow")
        # OpenMP's number of threads is each thread's own: oneDNN would else take all cores until this one's first
        # parallel operation of PyTorch's own.
        threads = torch.get_num_threads()
        self.call(lambda: torch.set_num_threads(threads), START_TIMEOUT_S)

    def take(self, camera: Camera, frame: ReceivedFrame) -> None:
        """Put a frame in its camera's place; one that still waited there is dropped."""
        if frame.starts_anew is not None:
            camera.reset(frame.starts_anew, whatever_stamp=False)
        if frame.refused is not None:
            camera.drop(frame, frame.refused)
            return
        with self._lock:
            replaced = self._waiting.get(camera.name)
            self._waiting[camera.name] = camera, frame
        if replaced is None:
            self._thread.submit(self._turn)
        else:
            camera.drop(replaced[1], SUPERSEDED)
        if time.monotonic_ns() - frame.arrival_ns < FRESH_NS:
            time.sleep(HANDOVER_S)

    def call(self, job: Callable[[], Result], timeout_s: float) -> Result:
        """Run ``job`` in the thread, between two turns, and return what it does.

        :raises TimeoutError: when it has not ended in time, or the thread has; if it has not begun then, it never will.
        """
        try:
            future = self._thread.submit(job)
        except RuntimeError as error:
            raise TimeoutError("the thread has ended") from error
        try:
            return future.result(timeout_s)
        except futures.TimeoutError as error:  # another class than TimeoutError before Python 3.11
            raise TimeoutError(f"not done within {timeout_s:g} s") from error
        finally:
            future.cancel()

    def drop_waiting(self, reason: str) -> None:
        """Drop the frames that no turn has come to."""
        with self._lock:
            turns, self._waiting = list(self._waiting.values()), {}
        for camera, frame in turns:
            camera.drop(frame, reason)

    def stop(self) -> None:
        """End the thread after the frames in hand."""
        self._thread.shutdown()

    def _turn(self) -> None:
        with self._lock:
            names = [name for name in self._order if name in self._waiting][: None if self._on_gpu else 1]
            turns = [self._waiting.pop(name) for name in names]
            self._order.sort(key=names.__contains__)  # they go to the end; the order of the others stays
        try:
            if turns:  # else they were withdrawn, or went together with others
                self.process(turns)
        except Exception:  # without a word there would be no account, and nobody would know
            traceback.print_exc()

    def process(self, turns: Sequence[Turn]) -> None:
        """Take each frame of a turn to its account, whatever happens to it."""
        try:
            limit_ms = self.time_limit_ms([camera for camera, _ in turns])
            begun = [camera.begin(frame, limit_ms) for camera, frame in turns]
            attempts = [attempt for attempt in begun if attempt is not None]
            for attempt, result in self._update(attempts):
                attempt.camera.finish(attempt, result)
            for attempt in attempts:
                # Not at the cost of another camera's frame that waits.
                if len(self._cameras) == 1 or not self._waiting:
                    attempt.camera.prepare()
        except Exception as error:
            for camera, frame in turns:
                camera.fail(frame, error)

    def time_limit_ms(self, whose: Sequence[Camera]) -> float | None:
        """Time that a turn of these cameras may take: its share of the budget, while others deliver images as well."""
        since_ns = time.monotonic_ns() - DELIVERING_NS
        delivering = [each for each in self._cameras if each in whose or each.last_arrival_ns > since_ns]
        # On a GPU frames of one size share a turn.
        shares = len({camera.last_shape for camera in delivering}) if self._on_gpu else len(delivering)
        return self.latency_budget_ms / shares if shares > 1 and self.latency_budget_ms else None

    def _update(self, attempts: Sequence[Attempt]) -> list[tuple[Attempt, FlowResult | None]]:
        """Run the estimators; a frame that fails has its account and is left out."""
        try:
            results = update_together([attempt.request for attempt in attempts])
            return list(zip(attempts, results, strict=True))
        except Exception as error:
            if len(attempts) == 1:
                attempts[0].camera.fail(attempts[0].frame, error)
                return []
            # Whose frame it was is not known, so each stream starts anew, and each frame is tried alone.
            for attempt in attempts:
                attempt.camera.recover(error)
            return [done for attempt in attempts for done in self._update([attempt])]
