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
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

if TYPE_CHECKING:
    from deq_flow_ros.streaming import FlowInfo

WINDOW_S = 10.0
"""Length of the sliding window."""
SUPERSEDED = "superseded by a newer frame"
RATE_LIMITED = "skipped to keep to max_rate_hz"
BY_DESIGN = (SUPERSEDED, RATE_LIMITED)
"""Reasons of drops that are no fault of the images; every other reason is one."""
PERCENTILES = (50, 95, 99)
"""Of the latency."""
MAX_KINDS = 20
"""Kinds of drops that are told apart; more go under `OTHER`, so that a hostile camera cannot fill the memory."""
OTHER = "other reasons"
WORTH_A_WARNING = 0.05
"""Share of frames that are late, lost or starved from which a camera is not well."""
OLD_STAMP_MS, EARLY_STAMP_MS = 1000.0, -50.0
"""Stamps older than this on arrival, or this far in the future, say that two clocks do not agree."""

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK,
    DiagnosticStatus.WARN,
    DiagnosticStatus.ERROR,
    DiagnosticStatus.STALE,
)


@lru_cache(maxsize=256)
def kind_of(reason: str) -> str:
    """A reason without what differs from frame to frame: numbers become N, quoted words '...', and it is cut short.

    "expected 9216 bytes, got 9209" and "expected 9216 bytes, got 12" are of one kind.
    """
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"'[^']*'", "'...'", reason[:200]))[:80].strip()


@dataclass(frozen=True)
class _Sample:
    """One frame: when it had its account, and what matters of it."""

    time_s: float
    outcome: str
    kind: str
    age_ms: float | None
    info: FlowInfo | None
    stage_ms: Mapping[str, float]


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
        self._samples: deque[_Sample] = deque()
        self._kinds: set[str] = set()

    def received(self, lost_before: int) -> None:
        """A frame came in, after some that were lost in the middleware."""
        now_s = self._clock()
        with self._lock:
            self._received.append((now_s, lost_before))
            while self._received[0][0] < now_s - self._window_s:
                self._received.popleft()

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
            kind = self._kind(reason) if outcome == "dropped" else ""
            self._samples.append(_Sample(now_s, outcome, kind, age_ms, info, stage_ms or {}))
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
        seconds = max(1e-3, min(self._window_s, now_s - self._started_s))
        return Window(seconds, len(received), sum(lost for _, lost in received), samples)

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
            return STALE, silence
        troubles = window.troubles()
        if troubles:
            return max(level for level, _ in troubles), "; ".join(text for _, text in troubles)
        return OK, window.summary()


@dataclass(frozen=True)
class Window:
    """What happened to one camera's frames within `seconds`."""

    seconds: float
    received: int
    lost: int
    samples: Sequence[_Sample]

    @cached_property
    def infos(self) -> list[FlowInfo]:
        """Of the processed frames, oldest first."""
        return [sample.info for sample in self.samples if sample.info is not None]

    @cached_property
    def drops(self) -> Counter[str]:
        """Dropped frames by kind of reason."""
        return Counter(sample.kind for sample in self.samples if sample.outcome == "dropped")

    def values(self) -> dict[str, str]:
        """All figures, by the keys that `docs/node.md` describes; those of which nothing is known are left out."""
        infos, count = self.infos, len(self.infos)
        values = {
            "window_s": f"{self.seconds:.1f}",
            "in_hz": f"{self.received / self.seconds:.2f}",
            "out_hz": f"{count / self.seconds:.2f}",
            "lost": str(self.lost),
            "dropped": str(self.drops.total()),
            **{f"dropped: {kind}": str(number) for kind, number in self.drops.most_common()},
        }
        if infos:
            latency = np.percentile([info.latency_ms for info in infos], PERCENTILES)
            values |= {f"latency_p{rank}_ms": f"{ms:.1f}" for rank, ms in zip(PERCENTILES, latency, strict=True)}
            values |= {
                "budget_ms": "" if infos[-1].budget_ms is None else f"{infos[-1].budget_ms:g}",
                "deadline_misses": str(sum(info.over_budget for info in infos)),
                "starved": str(sum(info.starved for info in infos)),
                "diverged": str(sum(info.stop_reason == "diverged" for info in infos)),
                "iterations_mean": f"{np.mean([info.iterations for info in infos]):.2f}",
                "scale_min": f"{min(info.scale for info in infos):.3g}",
                "scale_mean": f"{np.mean([info.scale for info in infos]):.3g}",
                "warm_share": f"{sum(info.warm for info in infos) / count:.3f}",
                **{f"stage_{name}_ms": f"{value:.2f}" for name, value in self.stage_means.items()},
            }
        ages = [sample.age_ms for sample in self.samples if sample.age_ms is not None]
        if ages:
            values |= {"input_age_p50_ms": f"{np.median(ages):.1f}", "input_age_max_ms": f"{max(ages):.1f}"}
        resets = [info.reset_reason for info in infos if info.reset_reason]
        values["resets"] = str(len(resets))
        if resets:
            values["last_reset"] = resets[-1]
        return values

    @cached_property
    def stage_means(self) -> dict[str, float]:
        """Mean time by stage over all processed frames, in ms; a stage that a frame did not have counts as 0."""
        totals: Counter[str] = Counter()
        for sample in self.samples:
            if sample.info is not None:
                totals.update(sample.info.stage_ms)
                totals.update(sample.stage_ms)
        return {name: total / len(self.infos) for name, total in totals.items()}

    def summary(self) -> str:
        """One line for when all is well: rates, latency, where the time goes, and what becomes of the other frames."""
        if not self.infos:
            return f"{self.received / self.seconds:.1f} images/s come in, no pair is processed yet"
        rates = f"{len(self.infos) / self.seconds:.1f} flow fields/s from {self.received / self.seconds:.1f} images/s"
        latency = np.median([info.latency_ms for info in self.infos])
        stages = {name: value for name, value in self.stage_means.items() if name != "wait"}
        slowest = max(stages, key=stages.__getitem__, default=None)
        most = "" if slowest is None else f", most of it {slowest} ({stages[slowest]:.0f} ms)"
        text = f"{rates}, latency {latency:.0f} ms{most}"
        if self.drops[SUPERSEDED] > WORTH_A_WARNING * self.received:
            text += ": slower than the camera, so newer images supersede waiting ones"
        return text

    def troubles(self) -> list[tuple[bytes, str]]:
        """(level, what is wrong and what to do) of all that is not as it should be."""
        troubles = []
        span, count = f"in the last {self.seconds:.0f} s", len(self.infos)
        refused = {kind: number for kind, number in self.drops.items() if kind not in BY_DESIGN}
        if refused:
            total, most = sum(refused.values()), max(refused, key=refused.__getitem__)
            usable = any(sample.outcome != "dropped" for sample in self.samples)
            text = f"{total} images could not be used {span}, most because: {most}"
            troubles.append((WARN if usable else ERROR, text))
        diverged = sum(info.stop_reason == "diverged" for info in self.infos)
        if diverged:
            text = f"the solver diverged {diverged} times in {count} pairs {span}; are the weights the right ones?"
            troubles.append((ERROR if 2 * diverged > count else WARN, text))
        late = [info for info in self.infos if info.over_budget]  # the budget may have changed since
        if sum(info.starved for info in self.infos) > WORTH_A_WARNING * count:
            text = (
                f"the budget of {late[-1].budget_ms:g} ms cannot be met ({len(late)} of {count} flow fields were late "
                f"{span}): one iteration at the lowest scale takes longer; raise latency_budget_ms, lower min_scale, "
                "or use a faster device"
            )
            troubles.append((WARN, text))
        elif len(late) > WORTH_A_WARNING * count:
            wait = self.stage_means.get("wait", 0.0)
            text = (
                f"{len(late)} of {count} flow fields came after the budget of {late[-1].budget_ms:g} ms {span} "
                f"(mean wait before processing {wait:.0f} ms); is another process keeping the processor busy? See "
                "`threads`, or raise latency_budget_ms"
            )
            troubles.append((WARN, text))
        if self.lost > WORTH_A_WARNING * (self.received + self.lost):
            text = (
                f"{self.lost} images were lost on the way {span}: start the camera with this package's "
                "config/fastdds.xml, and give /dev/shm more room"
            )
            troubles.append((WARN, text))
        ages = [sample.age_ms for sample in self.samples if sample.age_ms is not None]
        age = float(np.median(ages)) if ages else 0.0
        if not EARLY_STAMP_MS <= age <= OLD_STAMP_MS:
            which = f"{age / 1000:.1f} s old on arrival" if age > 0 else f"{-age / 1000:.1f} s in the future"
            text = f"stamps are {which}: synchronise the clocks, or set use_sim_time for a replay"
            troubles.append((WARN, text))
        return troubles


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
