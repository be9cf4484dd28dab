# SPDX-License-Identifier: Apache-2.0
"""What happened to the frames of one camera lately: in figures, and in words that say what is wrong and what to do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus

if TYPE_CHECKING:
    from deq_flow_ros.streaming import FlowInfo

SUPERSEDED = "superseded by a newer frame"
RATE_LIMITED = "skipped to keep to max_rate_hz"
BY_DESIGN = (SUPERSEDED, RATE_LIMITED)
"""Reasons of drops that are no fault of the images; every other reason is one."""
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

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


@lru_cache(maxsize=256)
def kind_of(reason: str) -> str:
    """A reason without what differs from frame to frame: numbers become N, quoted words '...', and it is cut short.

    "expected 9216 bytes, got 9209" and "expected 9216 bytes, got 12" are of one kind.
    """
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"'[^']*'", "'...'", reason[:200]))[:80].strip()


@dataclass(frozen=True)
class Sample:
    """One frame: when it had its account, and what matters of it.

    :ivar reason: why it was first; of a dropped one the kind of reason; else empty.
    """

    time_s: float
    outcome: str
    reason: str
    age_ms: float | None
    info: FlowInfo | None
    stage_ms: Mapping[str, float]


@dataclass(frozen=True)
class Window:
    """What happened to one camera's frames within `seconds`.

    :ivar full: whether images have been coming for all of this time.
    """

    seconds: float
    full: bool
    received: int
    lost: int
    samples: Sequence[Sample]

    @cached_property
    def infos(self) -> list[FlowInfo]:
        """Of the processed frames, oldest first."""
        return [sample.info for sample in self.samples if sample.info is not None]

    @cached_property
    def drops(self) -> Counter[str]:
        """Dropped frames by kind of reason."""
        return Counter(sample.reason for sample in self.samples if sample.outcome == "dropped")

    @cached_property
    def resets(self) -> list[str]:
        """Why the stream started anew, oldest first: with a first frame, or with a pair whose state was of no use."""
        resets = []
        named = False  # the pair after a first frame has the reason of that once more
        for sample in self.samples:
            if sample.outcome == "first":
                resets.append(sample.reason)
                named = True
            elif sample.info is not None:
                if sample.info.reset_reason and not named:
                    resets.append(sample.info.reset_reason)
                named = False
        return resets

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
        values["resets"] = str(len(self.resets))
        if self.resets:
            values["last_reset"] = self.resets[-1]
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
        if self.full and not self.infos:
            troubles += self._without_flow(span)
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

    def _without_flow(self, span: str) -> list[tuple[bytes, str]]:
        """Why nothing comes out, although images have come all the time."""
        starts = Counter(kind_of(sample.reason) for sample in self.samples if sample.outcome == "first")
        if starts:
            most = max(starts, key=starts.__getitem__)
            remedy = next((text for word, text in _REMEDIES.items() if word in most), "see `reason` in ~/statistics")
            text = f"no flow {span}: the stream started anew {starts.total()} times, most because: {most}; {remedy}"
            return [(WARN, text)]
        if self.drops[SUPERSEDED] and not self.drops.keys() - set(BY_DESIGN):
            text = (
                f"no flow {span}: the worker is not answering, so that all {self.drops[SUPERSEDED]} images were "
                "superseded by newer ones; a pair takes longer than this (set latency_budget_ms, or lower max_scale), "
                "or it hangs: restart the node, and see its log"
            )
            return [(ERROR, text)]
        return []
