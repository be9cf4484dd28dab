# SPDX-License-Identifier: Apache-2.0
"""How a node and its cameras have been doing lately, as ``diagnostic_msgs/DiagnosticStatus`` for ``/diagnostics``.

A status says in its message what is wrong and what to do about it, or, when all is well, where the time goes. All
arithmetic is done when a status is asked for.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticStatus

from deq_flow_ros.ros.accounts import Window
from deq_flow_ros.ros.process import status_of
from deq_flow_ros.ros.troubles import ERROR, OK, Clocks, troubles

PERCENTILES = (50, 95, 99)
"""Of the latency."""


def camera_status(
    name: str,
    topic: str,
    window: Window,
    idle: str | None = None,
    silence: str | None = None,
    clocks: Clocks = Clocks(),  # noqa: B008  immutable
) -> DiagnosticStatus:
    """The status of a camera: level, a message that says what is wrong and what to do, all figures as values.

    :param idle: why no images are expected ("disabled by ~/enable"); None while they are.
    :param silence: why no image comes (``qos.silence``); None while they do.
    :param clocks: by which old stamps are judged.
    """
    if idle is not None:
        level, message = OK, idle
    elif silence is not None:
        level, message = DiagnosticStatus.STALE, silence
    else:
        found = troubles(window, clocks)
        level = max((level for level, _ in found), default=OK)
        message = "; ".join([summary(window)] * (level == OK) + [text for _, text in found])
    return status_of(level, name, message, topic, {"image_topic": topic, **figures(window)})


def figures(window: Window) -> dict[str, str]:
    """All figures, by the keys that ``docs/node.md`` describes; those of which nothing is known are left out."""
    infos, count = window.infos, len(window.infos)
    values = {
        "window_s": f"{window.seconds:.1f}",
        "in_hz": f"{window.received / window.seconds:.2f}",
        "out_hz": f"{count / window.seconds:.2f}",
        "lost": str(window.lost),
        "dropped": str(window.drops.total()),
        **{f"dropped: {kind}": str(number) for kind, number in window.drops.most_common()},
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
            **{f"stage_{name}_ms": f"{value:.2f}" for name, value in window.stage_means.items()},
        }
    if ages := window.ages_ms:
        values |= {"input_age_p50_ms": f"{np.median(ages):.1f}", "input_age_max_ms": f"{max(ages):.1f}"}
    values["resets"] = str(len(window.resets))
    if window.resets:
        values["last_reset"] = window.resets[-1]
    return values


def summary(window: Window) -> str:
    """One line for when all is well: rates, latency, where the time goes, and what becomes of the other frames."""
    came_hz = window.received / window.seconds
    if not window.infos:
        return f"{came_hz:.1f} images/s come in, no pair is processed yet"
    latency = np.median([info.latency_ms for info in window.infos])
    stages = {name: value for name, value in window.stage_means.items() if name != "wait"}
    slowest = max(stages, key=stages.__getitem__, default=None)
    most = "" if slowest is None else f", most of it {slowest} ({stages[slowest]:.0f} ms)"
    rates = f"{len(window.infos) / window.seconds:.1f} flow fields/s from {came_hz:.1f} images/s"
    return f"{rates}, latency {latency:.0f} ms{most}"


class Health:
    """The status of a process.

    :param name: of the status.
    :ivar failure: why the node could not be configured, else None.
    """

    def __init__(self, name: str) -> None:
        self.failure: str | None = None
        self._name = name
        self._device: torch.device | None = None
        self._about: dict[str, str] = {}
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()

    def configured(self, device: torch.device, model: str, **about: object) -> None:
        """What the process works with: device, model, and what else is worth knowing (``threads=1``)."""
        self.failure = None
        self._device = device
        self._about = {"model": model, **{name: str(value) for name, value in about.items()}}

    def cleaned_up(self, failure: str | None = None) -> None:
        """The node is unconfigured (again), or could not be configured for the reason given."""
        self.failure = failure
        self._device, self._about = None, {}

    def status(self) -> DiagnosticStatus:
        """What the process works with and takes, or why it does not work."""
        now_cpu_s, now_wall_s = time.process_time(), time.monotonic()
        cores = (now_cpu_s - self._cpu_s) / max(1e-3, now_wall_s - self._wall_s)
        self._cpu_s, self._wall_s = now_cpu_s, now_wall_s
        memory = memory_mb(self._device)
        device = "" if self._device is None else str(self._device)
        values = {"device": device, **self._about, "cpu_cores_used": f"{cores:.2f}"}
        values |= {f"{name}_mb": f"{value:.1f}" for name, value in memory.items()}
        if self._device is not None and self._device.type == "cuda":
            values["device_name"] = torch.cuda.get_device_name(self._device)
        level, message = OK, "not configured"
        if self.failure is not None:
            level, message = ERROR, self.failure
        elif self._device is not None:
            message = f"{self._about['model']} on {device}, {cores:.1f} processor cores busy, {memory['rss']:.0f} MB"
            if "cuda_allocated" in memory:
                message += f", {memory['cuda_allocated']:.0f} MB on the device"
        return status_of(level, self._name, message, device, values)


def memory_mb(device: torch.device | None) -> dict[str, float]:
    """Memory of this process in MB (10^6 bytes): ``rss`` now and ``rss_peak``, on CUDA also what tensors take there."""
    status = Path("/proc/self/status").read_text()
    kilobytes = {name: int(value) for name, value in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.MULTILINE)}
    memory = {"rss": kilobytes["VmRSS"] * 1.024e-3, "rss_peak": kilobytes["VmHWM"] * 1.024e-3}
    if device is not None and device.type == "cuda":
        memory["cuda_allocated"] = torch.cuda.memory_allocated(device) / 1e6
        memory["cuda_peak"] = torch.cuda.max_memory_allocated(device) / 1e6
        memory["cuda_reserved"] = torch.cuda.memory_reserved(device) / 1e6
    return memory
