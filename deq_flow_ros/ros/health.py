# SPDX-License-Identifier: Apache-2.0
"""How a node and its cameras have been doing lately, as ``diagnostic_msgs/DiagnosticStatus`` for ``/diagnostics``.

A status says in its message what is wrong and what to do about it, or, when all is well, where the time goes. All
arithmetic is done when a status is asked for.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticStatus

from deq_flow_ros.ros.accounts import BY_DESIGN, SUPERSEDED, Window, kind_of, status_of

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
PERCENTILES = (50, 95, 99)
"""Of the latency."""
WORTH_A_WARNING = 0.05
"""Share of frames that are late, lost or starved from which a camera is not well."""
OLD_STAMP_MS, EARLY_STAMP_MS = 1000.0, -50.0
"""Stamps older than this on arrival, or this far in the future, say that two clocks do not agree."""
_OTHER_CAMERA = "do two cameras publish the topic (`ros2 topic info -v`)?"
_REMEDIES = {
    "gap of": "raise max_gap_ms above the time between two images, or see why they are so far apart",
    "time ": f"mend the camera's stamps; or {_OTHER_CAMERA}",
    "size changed": _OTHER_CAMERA,
    "encoding changed": _OTHER_CAMERA,
    "frame_id changed": _OTHER_CAMERA,
    "scene cut": f"the images have nothing in common: is the camera too slow for its motion, or {_OTHER_CAMERA}",
    "a frame failed": "the log says where",
}
"""Of a stream that starts anew with every image, by a word of the reason."""


def camera_status(
    name: str, topic: str, window: Window, idle: str | None = None, silence: str | None = None
) -> DiagnosticStatus:
    """The status of a camera: level, a message that says what is wrong and what to do, all figures as values.

    :param idle: why no images are expected ("disabled by ~/enable"); None while they are.
    :param silence: why no image comes (``qos.silence``); None while they do.
    """
    if idle is not None:
        level, message = OK, idle
    elif silence is not None:
        level, message = DiagnosticStatus.STALE, silence
    elif found := troubles(window):
        level, message = max(level for level, _ in found), "; ".join(text for _, text in found)
    else:
        level, message = OK, summary(window)
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
    text = f"{rates}, latency {latency:.0f} ms{most}"
    if window.drops[SUPERSEDED] > WORTH_A_WARNING * window.received:
        text += ": slower than the camera, so newer images supersede waiting ones"
    return text


def troubles(window: Window) -> list[tuple[bytes, str]]:
    """(level, what is wrong and what to do) of all that is not as it should be."""
    found = []
    span, infos, count = f"in the last {window.seconds:.0f} s", window.infos, len(window.infos)
    refused = {kind: number for kind, number in window.drops.items() if kind not in BY_DESIGN}
    if refused:
        total, most = sum(refused.values()), max(refused, key=refused.__getitem__)
        usable = any(sample.outcome != "dropped" for sample in window.samples)
        text = f"{total} images could not be used {span}, most because: {most}"
        found.append((WARN if usable else ERROR, text))
    if window.full and not infos:
        found += _without_flow(window, span)
    diverged = sum(info.stop_reason == "diverged" for info in infos)
    if diverged:
        text = f"the solver diverged {diverged} times in {count} pairs {span}; are the weights the right ones?"
        found.append((ERROR if 2 * diverged > count else WARN, text))
    late = [info for info in infos if info.over_budget]  # the budget may have changed since
    if sum(info.starved for info in infos) > WORTH_A_WARNING * count:
        text = (
            f"the budget of {late[-1].budget_ms:g} ms cannot be met ({len(late)} of {count} flow fields were late "
            f"{span}): one iteration at the lowest scale takes longer; raise latency_budget_ms, lower min_scale, "
            "or use a faster device"
        )
        found.append((WARN, text))
    elif len(late) > WORTH_A_WARNING * count:
        text = (
            f"{len(late)} of {count} flow fields came after the budget of {late[-1].budget_ms:g} ms {span} "
            f"(mean wait before processing {window.stage_means.get('wait', 0.0):.0f} ms); is another process keeping "
            "the processor busy? See `threads`, or raise latency_budget_ms"
        )
        found.append((WARN, text))
    if window.lost > WORTH_A_WARNING * (window.received + window.lost):
        text = (
            f"{window.lost} images were lost on the way {span}: start the camera with this package's "
            "config/fastdds.xml, and give /dev/shm more room"
        )
        found.append((WARN, text))
    age = float(np.median(window.ages_ms)) if window.ages_ms else 0.0
    if not EARLY_STAMP_MS <= age <= OLD_STAMP_MS:
        which = f"{age / 1000:.1f} s old on arrival" if age > 0 else f"{-age / 1000:.1f} s in the future"
        found.append((WARN, f"stamps are {which}: synchronise the clocks, or set use_sim_time for a replay"))
    return found


def _without_flow(window: Window, span: str) -> list[tuple[bytes, str]]:
    """Why nothing comes out, although images have come all the time."""
    starts = Counter(kind_of(sample.reason) for sample in window.samples if sample.outcome == "first")
    if starts:
        most = max(starts, key=starts.__getitem__)
        remedy = next((text for word, text in _REMEDIES.items() if word in most), "see `reason` in ~/statistics")
        text = f"no flow {span}: the stream started anew {starts.total()} times, most because: {most}; {remedy}"
        return [(WARN, text)]
    if window.drops[SUPERSEDED] and not window.drops.keys() - set(BY_DESIGN):
        text = (
            f"no flow {span}: the worker is not answering, so that all {window.drops[SUPERSEDED]} images were "
            "superseded by newer ones; a pair takes longer than this (set latency_budget_ms, or lower max_scale), "
            "or it hangs: restart the node, and see its log"
        )
        return [(ERROR, text)]
    return []


class Watched(Protocol):
    """What has a status beside the process: a camera."""

    name: str

    def status(self, name: str) -> DiagnosticStatus:
        """How it has been doing; the status has this name."""


class Health:
    """The statuses of a node: one for the process and one for each camera.

    :param node_name: full name, "/robot/flow_node"; statuses are named after it.
    :ivar failure: why the node could not be configured, else None.
    """

    def __init__(self, node_name: str) -> None:
        self.failure: str | None = None
        self._node_name = node_name.lstrip("/")
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
        self._device = None
        self._about = {}

    def statuses(self, cameras: Iterable[Watched]) -> list[DiagnosticStatus]:
        """One status for the process, then one for each camera."""
        return [
            self._process(),
            *(camera.status(f"{self._node_name}: {camera.name or 'flow'}") for camera in cameras),
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
        level, message = OK, "not configured"
        if self.failure is not None:
            level, message = ERROR, self.failure
        elif self._device is not None:
            message = f"{self._about['model']} on {device}, {cores:.1f} processor cores busy, {memory['rss']:.0f} MB"
            if "cuda_allocated" in memory:
                message += f", {memory['cuda_allocated']:.0f} MB on the device"
        return status_of(level, f"{self._node_name}: process", message, device, values)


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
