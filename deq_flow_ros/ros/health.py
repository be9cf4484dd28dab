# SPDX-License-Identifier: Apache-2.0
"""How a node and its cameras have been doing lately, as `diagnostic_msgs/DiagnosticStatus` for `/diagnostics`.

Each camera has counters over a sliding window; a status says in its message what is wrong and what to do about it,
or, when all is well, where the time goes. Taking in a frame costs microseconds; all arithmetic is done when a status is
asked for. Callable from any thread.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from deq_flow_ros.ros.window import BY_DESIGN, ERROR, OK, Sample, Window, kind_of

if TYPE_CHECKING:
    from deq_flow_ros.streaming import FlowInfo

WINDOW_S = 10.0
"""Length of the sliding window."""
MAX_KINDS = 20
"""Kinds of drops that are told apart; more go under `OTHER`, so that a hostile camera cannot fill the memory."""
OTHER = "other reasons"
MAX_REASON = 200
"""Characters kept of the reason why a stream starts; it may quote the camera."""


class CameraHealth:
    """Counters of one camera over a sliding window.

    :ivar idle: why no images are expected ("disabled by ~/enable"), else None.
    :ivar silence: set by whoever watches the topic while no image comes: why (`watch.silence`); else None.
    """

    def __init__(self, topic: str, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.topic = topic
        self.idle: str | None = None
        self.silence: str | None = None
        self._window_s = window_s
        self._clock = clock
        self._started_s = clock()
        self._lock = threading.Lock()
        self._received: deque[tuple[float, int]] = deque()  # when, and how many were lost before it
        self._arriving_since_s = 0.0
        self._samples: deque[Sample] = deque()
        self._kinds: set[str] = set()

    def received(self, lost_before: int) -> None:
        """A frame came in, after some that were lost in the middleware."""
        now_s = self._clock()
        with self._lock:
            while self._received and self._received[0][0] < now_s - self._window_s:
                self._received.popleft()
            if not self._received:  # they begin to come, at the start or after silence
                self._arriving_since_s = now_s
            self._received.append((now_s, lost_before))

    def accounted(
        self,
        outcome: str,
        reason: str = "",
        age_ms: float | None = None,
        info: FlowInfo | None = None,
        stage_ms: Mapping[str, float] | None = None,
    ) -> None:
        """A frame has its account: "processed" (with `info`), "first" or "dropped" (with a `reason`)."""
        now_s = self._clock()
        with self._lock:
            kept = self._kind(reason) if outcome == "dropped" else reason[:MAX_REASON]
            self._samples.append(Sample(now_s, outcome, kept, age_ms, info, stage_ms or {}))
            while self._samples[0].time_s < now_s - self._window_s:
                self._samples.popleft()

    def _kind(self, reason: str) -> str:
        kind = reason if reason in BY_DESIGN else kind_of(reason)
        if kind in self._kinds or len(self._kinds) < MAX_KINDS:
            self._kinds.add(kind)
            return kind
        return OTHER

    def window(self) -> Window:
        """What happened within the window that ends now."""
        now_s = self._clock()
        oldest_s = now_s - self._window_s
        with self._lock:
            received = [entry for entry in self._received if entry[0] >= oldest_s]
            samples = [sample for sample in self._samples if sample.time_s >= oldest_s]
            full = bool(received) and self._arriving_since_s <= oldest_s
        seconds = max(1e-3, min(self._window_s, now_s - self._started_s))
        return Window(seconds, full, len(received), sum(lost for _, lost in received), samples)

    def status(self, name: str) -> DiagnosticStatus:
        """The status of this camera: level, a message that says what is wrong and what to do, all figures as values."""
        window = self.window()
        level, message = self._verdict(window)
        values = {"image_topic": self.topic, **window.values()}
        return _status(level, name, message, self.topic, values)

    def _verdict(self, window: Window) -> tuple[bytes, str]:
        idle, silence = self.idle, self.silence  # each read once: another thread may set them meanwhile
        if idle is not None:
            return OK, idle
        if silence is not None:
            return DiagnosticStatus.STALE, silence
        troubles = window.troubles()
        if troubles:
            return max(level for level, _ in troubles), "; ".join(text for _, text in troubles)
        return OK, window.summary()


class Health:
    """The statuses of a node: one for the process and one for each camera.

    :ivar cameras: by name; filled by `configure`, emptied by `cleanup`.
    :ivar failure: why the node could not be configured, else None.
    """

    def __init__(self, node_name: str) -> None:
        """:param node_name: full name, "/robot/flow_node"; statuses are named after it."""
        self.cameras: dict[str, CameraHealth] = {}
        self.failure: str | None = None
        self._node_name = node_name.lstrip("/")
        self._device: torch.device | None = None
        self._about: dict[str, str] = {}
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()

    def configured(self, device: torch.device, model: str, **about: object) -> None:
        """What the process works with: device, model, and what else is worth knowing (`threads=1`)."""
        self.failure = None
        self._device = device
        self._about = {"model": model, **{name: str(value) for name, value in about.items()}}

    def cleaned_up(self, failure: str | None = None) -> None:
        """The node is unconfigured (again), or could not be configured for the reason given."""
        self.failure = failure
        self._device = None
        self._about = {}
        self.cameras = {}

    def statuses(self) -> list[DiagnosticStatus]:
        """One status for the process, then one for each camera."""
        return [
            self._process(),
            *(camera.status(f"{self._node_name}: {name or 'flow'}") for name, camera in self.cameras.items()),
        ]

    def _process(self) -> DiagnosticStatus:
        now_cpu_s, now_wall_s = time.process_time(), time.monotonic()
        cores = (now_cpu_s - self._cpu_s) / max(1e-3, now_wall_s - self._wall_s)
        self._cpu_s, self._wall_s = now_cpu_s, now_wall_s
        memory = memory_mb(self._device)
        device = "" if self._device is None else str(self._device)
        values = {"device": device, **self._about, "cpu_cores_used": f"{cores:.2f}"}
        values |= {f"{name}_mb": f"{value:.1f}" for name, value in memory.items()}
        if self._device is not None and self._device.type == "cuda":
            values["device_name"] = torch.cuda.get_device_name(self._device)
        if self.failure is not None:
            return _status(ERROR, f"{self._node_name}: process", self.failure, device, values)
        if self._device is None:
            return _status(OK, f"{self._node_name}: process", "not configured", device, values)
        message = f"{self._about['model']} on {device}, {cores:.1f} processor cores busy, {memory['rss']:.0f} MB"
        if "cuda_allocated" in memory:
            message += f", {memory['cuda_allocated']:.0f} MB on the device"
        return _status(OK, f"{self._node_name}: process", message, device, values)


def memory_mb(device: torch.device | None) -> dict[str, float]:
    """Memory of this process in MB (10^6 bytes): `rss` now and `rss_peak`, on CUDA also what tensors take there."""
    status = Path("/proc/self/status").read_text()
    kilobytes = {name: int(value) for name, value in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.MULTILINE)}
    memory = {"rss": kilobytes["VmRSS"] * 1.024e-3, "rss_peak": kilobytes["VmHWM"] * 1.024e-3}
    if device is not None and device.type == "cuda":
        memory["cuda_allocated"] = torch.cuda.memory_allocated(device) / 1e6
        memory["cuda_peak"] = torch.cuda.max_memory_allocated(device) / 1e6
        memory["cuda_reserved"] = torch.cuda.memory_reserved(device) / 1e6
    return memory


def _status(level: bytes, name: str, message: str, hardware_id: str, values: Mapping[str, str]) -> DiagnosticStatus:
    status = DiagnosticStatus(level=level, name=name, message=message, hardware_id=hardware_id)
    status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
    return status
