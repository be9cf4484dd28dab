# SPDX-License-Identifier: Apache-2.0
"""How a camera and the process have been doing lately, as ``diagnostic_msgs/DiagnosticStatus`` for ``/diagnostics``.

The status of a camera says what is wrong and what to do about it, or, when all is well, where the time goes. All
arithmetic is done when a status is asked for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticStatus

from deq_flow_ros.ros import qos
from deq_flow_ros.ros.accounts import BY_DESIGN, SUPERSEDED, Window, kind_of
from deq_flow_ros.ros.process import status_of
from deq_flow_ros.streaming.continuity import FLAT, LEFT_OUT
from deq_flow_ros.streaming.interface import REPEATED_SHARE

Trouble: TypeAlias = tuple[bytes, str]  # level, and what is wrong and what to do
OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
WORTH_A_WARNING = 0.05
"""Share of frames that are late, lost, left out or superseded from which it is worth a word."""
AT_ONCE = 3
"""So many in a row, or so many times, are worth a word before a window has gone by."""
LATELY, STARVED_SHARE = 20, 0.75
"""The share of the last flow fields late with a single iteration from which on the budget cannot be met."""
MOST_KINDS = 20
"""Reasons of drops that are told apart, so that a hostile camera cannot fill the message."""
OLD_STAMP_MS, EARLY_STAMP_MS, EARLY_CLOCK_MS = 1000.0, -50.0, -1000.0
"""Stamps older, or further in the future, say that two clocks do not agree; /clock, published now and then, may lag."""
MOST_DRIFT = 0.5
"""Stamps that lose or gain more than this, in s per second, are of no clock that runs as ours."""
ANOTHER_TIME_MS = 24 * 3600e3
"""A clock that is wrong by more is not one that has drifted: it was never set, or this is a recording."""
_UNITS_MS = (("years", 365.25 * 86400e3), ("days", 86400e3), ("hours", 3600e3), ("minutes", 60e3), ("s", 1e3))
_OTHER_CAMERA = "do two cameras publish the topic (`ros2 topic info -v`)?"
_STAMPS = f"mend the camera's stamps; or {_OTHER_CAMERA}"
_REMEDIES = {
    "gap of": "raise max_gap_ms above the time between two images, or see why they are so far apart",
    "time went back": _STAMPS,
    "size changed": _OTHER_CAMERA,
    "encoding changed": _OTHER_CAMERA,
    "frame_id changed": _OTHER_CAMERA,
    "scene cut": f"the images have nothing in common: is the camera too slow for its motion, or {_OTHER_CAMERA}",
    FLAT: "there is no contrast to compute on; is the lens covered, or the exposure or intensity_range wrong?",
    "a frame failed": "the log says where",
}
"""Of a stream that starts anew with every image, by a word of the reason."""
_UNMATCHED = (
    "mean nothing (`matched` is false in ~/statistics), as their images have nothing in common: is the lens covered, "
    f"the motion too fast, or {_OTHER_CAMERA}"
)
_REPEATED = (
    "are zero whatever moves, as their images were exactly those before them: is the camera frozen, or does its driver "
    "send each image more than once? (A simulated camera that stands still has no noise, and encoders of video leave "
    "out what hardly differs.)"
)


@dataclass(frozen=True)
class Clocks:
    """Whether a player publishes the images, the node takes its time from /clock, and somebody publishes that."""

    played: bool = False
    simulated: bool = False
    offered: bool = False


def camera_status(
    name: str, topic: str, window: Window, idle: str | None = None, silence: str | None = None,
    clocks: Clocks = Clocks(),
) -> DiagnosticStatus:  # fmt: skip
    """The status of a camera: level, a message that says what is wrong and what to do, all figures as values.

    :param idle: why no images are expected ("disabled by ~/enable"); None while they are.
    :param silence: why no image comes (``qos.silence``); None while they do.
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
        **{f"dropped: {kind}": str(number) for kind, number in window.drops.most_common(MOST_KINDS)},
    }
    if infos:
        latency_ms = [info.latency_ms for info in infos]
        values |= {f"latency_p{rank}_ms": f"{np.percentile(latency_ms, rank):.1f}" for rank in (50, 95, 99)}
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
    return values | ({"last_reset": window.resets[-1]} if window.resets else {})


def summary(window: Window) -> str:
    """One line for when all is well: rates, latency, where the time goes, and what becomes of the other frames."""
    came_hz = window.received / window.seconds
    if not window.infos:
        return f"{came_hz:.1f} images/s come in, no pair is processed yet"
    latency = np.median([info.latency_ms for info in window.infos])
    stages = {name: value for name, value in window.stage_means.items() if name != "wait"}
    slowest = max(stages, key=stages.__getitem__)
    rates = f"{len(window.infos) / window.seconds:.1f} flow fields/s from {came_hz:.1f} images/s"
    return f"{rates}, latency {latency:.0f} ms, most of it {slowest} ({stages[slowest]:.0f} ms)"


def troubles(window: Window, clocks: Clocks) -> list[Trouble]:
    """All that is worth a word, the worst first; what is no fault is OK."""
    span = f"in the last {window.seconds:.0f} s"
    found = [*_drops(window, span), *_breaks(window, span), *_doubtful(window), *_solves(window, span)]
    if window.lost > WORTH_A_WARNING * (window.received + window.lost):
        found.append((WARN, f"{window.lost} images were lost on the way {span}: {qos.transport_advice()}"))
    found += _stamps(window, clocks)
    return sorted(found, key=lambda trouble: trouble[0], reverse=True)


def _drops(window: Window, span: str) -> Iterator[Trouble]:
    """Of images that cannot be used, and that do not fit into the order of the stamps: a single one is no matter."""
    faults = {kind: count for kind, count in window.drops.most_common() if kind not in BY_DESIGN}
    left_out = {kind: count for kind, count in faults.items() if kind.endswith(LEFT_OUT)}
    taken = sum(sample.outcome != "dropped" for sample in window.samples)
    if unusable := {kind: count for kind, count in faults.items() if kind not in left_out}:
        why = f"{'because' if len(unusable) == 1 else 'most because'}: {window.latest_reason(next(iter(unusable)))}"
        yield WARN if taken else ERROR, f"{sum(unusable.values())} images could not be used {span}, {why}"
    if (count := sum(left_out.values())) > WORTH_A_WARNING * window.received:
        why = window.latest_reason(next(iter(left_out))).removesuffix(f": {LEFT_OUT}")
        text = f"{count} of {window.received} images were left out {span}: {why}; {_STAMPS}"
        yield WARN if window.infos or not window.full else ERROR, text
    superseded = window.drops[SUPERSEDED]
    if superseded and window.full and not window.infos and not faults and taken < 2:
        yield ERROR, (
            f"no flow {span}: the worker is not answering, so that all {superseded} images were superseded by newer "
            "ones; a pair takes longer than this (set latency_budget_ms, or lower max_scale), or it hangs: restart the "
            "node, and see its log"
        )
    elif window.infos and superseded > WORTH_A_WARNING * window.received:
        yield OK, f"{superseded} of {window.received} images were superseded by newer ones: slower than the camera"


def _worth_a_word(faulty: Sequence[bool], share: float = WORTH_A_WARNING) -> tuple[int, int]:
    """How many are faulty, of how many: the last ones in a row, or all where it is so time and again; else 0 of 0."""
    row = len(list(takewhile(bool, reversed(faulty))))
    times = sum(now and not before for before, now in pairwise([False, *faulty]))
    if row >= AT_ONCE:
        return row, row
    return (sum(faulty), len(faulty)) if times >= AT_ONCE and times > share * len(faulty) else (0, 0)


def _breaks(window: Window, span: str) -> Iterator[Trouble]:
    """Of a stream that starts anew with each image at present, or again and again, for a reason that has a remedy."""

    def remedy(reason: str) -> str:
        return next((text for word, text in _REMEDIES.items() if word in reason), "")

    taken = [sample for sample in window.samples if sample.outcome != "dropped"]
    starts, looked_at = _worth_a_word([sample.outcome == "first" for sample in taken])
    if not starts:
        return
    kinds = Counter(kind_of(sample.reason) for sample in taken[-looked_at:] if sample.outcome == "first")
    most = window.latest_reason(kinds.most_common(1)[0][0])
    if starts == looked_at:
        yield WARN, f"no flow from the last {starts} images, because: {most}; {remedy(most) or 'see ~/statistics'}"
    elif remedy(most):
        yield WARN, f"the stream started anew {starts} times {span}, most because: {most}; {remedy(most)}"


def _doubtful(window: Window) -> Iterator[Trouble]:
    """Of flow that was published and means nothing, or that is zero because the camera gave no new image."""
    unmatched = _worth_a_word([not info.matched for info in window.infos])
    repeated = _worth_a_word([info.repeated for info in window.infos], REPEATED_SHARE)
    for (count, looked_at), words in ((unmatched, _UNMATCHED), (repeated, _REPEATED)):
        if count:
            yield WARN, f"{count} of the last {looked_at} flow fields {words}"


def _solves(window: Window, span: str) -> Iterator[Trouble]:
    infos, count = window.infos, len(window.infos)
    if diverged := sum(info.stop_reason == "diverged" for info in infos):
        text = f"the solver diverged {diverged} times in {count} pairs {span}; are the weights the right ones?"
        yield ERROR if 2 * diverged > count else WARN, text
    late, lately = [info for info in infos if info.over_budget], infos[-LATELY:]  # the budget may have changed since
    if late and sum(info.starved for info in lately) >= STARVED_SHARE * LATELY:
        yield WARN, (
            f"the budget of {late[-1].budget_ms:g} ms cannot be met: {len(late)} of {count} flow fields were late "
            f"{span}, and one iteration at the lowest scale takes longer; raise latency_budget_ms, use a faster "
            "device, or lower min_scale, which helps until the short side of the images is processed at 96 px"
        )
    elif len(late) > WORTH_A_WARNING * count:
        yield WARN, (
            f"{len(late)} of {count} flow fields came after the budget of {late[-1].budget_ms:g} ms {span} (mean wait "
            f"before processing {window.stage_means.get('wait', 0.0):.0f} ms); is another process keeping the "
            "processor busy? See `threads`, or raise latency_budget_ms"
        )


def _stamps(window: Window, clocks: Clocks) -> Iterator[Trouble]:
    """Stamps of a recording are no fault: nothing but their age depends on this machine's clock."""
    if clocks.simulated and not clocks.offered:
        yield OK, "use_sim_time is set, and nobody publishes /clock: how old the images are is not known"
        return
    if abs(window.drift) > MOST_DRIFT and not (clocks.simulated or clocks.offered or clocks.played):
        advance = f"stamps advance by {1 - window.drift:.3g} s in a second: they are in another unit, or those of a"
        yield WARN, f"{advance} simulation, for which use_sim_time is to be set, or images take ever longer to arrive"
        return
    age_ms = float(np.median(window.ages_ms)) if window.ages_ms else 0.0
    if (EARLY_CLOCK_MS if clocks.simulated else EARLY_STAMP_MS) <= age_ms <= OLD_STAMP_MS:
        return
    stamps = f"stamps are {_duration(abs(age_ms))} {'old on arrival' if age_ms > 0 else 'in the future'}"
    if clocks.simulated:
        yield WARN, f"{stamps} by /clock: it and the images do not belong to one recording"
    elif clocks.offered:
        yield WARN, f"{stamps}, and /clock is published: set use_sim_time, so that ages are counted by it"
    elif clocks.played or age_ms > ANOTHER_TIME_MS:
        yield OK, f"{stamps}, as those of a recording are, or of a camera whose clock was never set"
    else:
        yield WARN, f"{stamps}: synchronise the clocks of the camera and of this machine"


def _duration(ms: float) -> str:
    """In the largest unit that it has at least two of: "3.2 s", "5.0 days"."""
    unit, length_ms = next(((unit, length) for unit, length in _UNITS_MS if ms >= 2 * length), _UNITS_MS[-1])
    return f"{ms / length_ms:.1f} {unit}"


class ProcessStatus:
    """What a process works with and takes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()
        self._failure: str | None = None
        self._device: torch.device | None = None
        self._about: dict[str, str] = {}

    def configured(self, device: torch.device, model: str, **about: object) -> None:
        """What the process works with: device, model, and what else is worth knowing (``threads=1``)."""
        self._failure, self._device = None, device
        self._about = {"model": model, **{name: str(value) for name, value in about.items()}}

    def cleaned_up(self, failure: str | None = None) -> None:
        """The node is unconfigured (again), or could not be configured for the reason given."""
        self._failure, self._device, self._about = failure, None, {}

    def status(self) -> DiagnosticStatus:
        """What the process works with and takes, or why it does not work."""
        now_cpu_s, now_wall_s = time.process_time(), time.monotonic()
        cores = (now_cpu_s - self._cpu_s) / max(1e-3, now_wall_s - self._wall_s)
        self._cpu_s, self._wall_s = now_cpu_s, now_wall_s
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        rss, peak = (int(lines[key].split()[0]) * 1.024e-3 for key in ("VmRSS", "VmHWM"))  # kB of 1024 bytes; MB of 1e6
        device = "" if self._device is None else str(self._device)
        values = {"device": device, **self._about, "cpu_cores_used": f"{cores:.2f}"}
        values |= {"rss_mb": f"{rss:.1f}", "rss_peak_mb": f"{peak:.1f}"}
        level, message = DiagnosticStatus.OK, "not configured"
        if self._failure is not None:
            level, message = DiagnosticStatus.ERROR, self._failure
        elif self._device is not None:
            message = f"{self._about['model']} on {device}, {cores:.1f} processor cores busy, {rss:.0f} MB"
            if self._device.type == "cuda":
                cuda = torch.cuda
                taken = (cuda.memory_allocated, cuda.max_memory_allocated, cuda.memory_reserved)
                for name, read in zip(("allocated", "peak", "reserved"), taken, strict=True):
                    values[f"cuda_{name}_mb"] = f"{read(self._device) / 1e6:.1f}"
                values["device_name"] = cuda.get_device_name(self._device)
                message += f", {values['cuda_allocated_mb']} MB on the device"
        return status_of(level, self._name, message, device, values)
