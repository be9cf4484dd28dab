# SPDX-License-Identifier: Apache-2.0
"""How a camera has been doing lately, as ``diagnostic_msgs/DiagnosticStatus`` for ``/diagnostics``.

A status says in its message what is wrong and what to do about it, or, when all is well, where the time goes. All
arithmetic is done when a status is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TypeAlias

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus

from deq_flow_ros.ros import qos
from deq_flow_ros.ros.accounts import BY_DESIGN, LATELY, STARVED_SHARE, SUPERSEDED, UNMET_REMEDY, Window
from deq_flow_ros.ros.process import status_of
from deq_flow_ros.streaming.continuity import FLAT, LEFT_OUT
from deq_flow_ros.streaming.result import REPEATED_SHARE

Trouble: TypeAlias = tuple[bytes, str]  # level, and what is wrong and what to do
OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
WORTH_A_WARNING = 0.05
"""Share of frames that are late, lost, left out or superseded from which it is worth a word."""
OLD_STAMP_MS, EARLY_STAMP_MS, EARLY_CLOCK_MS = 1000.0, -50.0, -1000.0
"""Stamps older than this on arrival, or this far in the future, say that two clocks do not agree; /clock, which is
published now and then, may be behind by more than a machine's clock."""
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
AT_ONCE = 3
"""So many in a row, or so many times, are worth a word before a window has gone by."""


@dataclass(frozen=True)
class Clocks:
    """What is known of the clocks that stamps and ages come from.

    :ivar played: whether a player publishes the images.
    :ivar simulated: whether the node takes its time from /clock (``use_sim_time``).
    :ivar offered: whether somebody publishes /clock.
    """

    played: bool = False
    simulated: bool = False
    offered: bool = False


def camera_status(
    name: str,
    topic: str,
    window: Window,
    idle: str | None = None,
    silence: str | None = None,
    clocks: Clocks = Clocks(),
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


def troubles(window: Window, clocks: Clocks) -> list[Trouble]:
    """All that is worth a word, the worst first; what is no fault is OK."""
    span = f"in the last {window.seconds:.0f} s"
    found = [*_dropped(window, span)]
    found += _without_flow(window, span) if window.full and not window.infos else _breaks(window, span)
    found += [*_doubtful(window, span), *_solves(window, span)]
    if window.lost > WORTH_A_WARNING * (window.received + window.lost):
        found.append((WARN, f"{window.lost} images were lost on the way {span}: {qos.transport_advice()}"))
    found += _stamps(window, clocks)
    return sorted(found, key=lambda trouble: trouble[0], reverse=True)


def _dropped(window: Window, span: str) -> Iterator[Trouble]:
    """Of images that cannot be used, and that do not fit into the order of the stamps: a single one is no matter."""
    faults = Counter({kind: count for kind, count in window.drops.items() if kind not in BY_DESIGN})
    left_out = Counter({kind: count for kind, count in faults.items() if kind.endswith(LEFT_OUT)})
    if unusable := faults - left_out:
        most, count = unusable.most_common(1)[0]
        why = "because" if len(unusable) == 1 else f"{count} of them because"
        text = f"{unusable.total()} images could not be used {span}, {why}: {window.latest_reason(most)}"
        yield WARN if any(sample.outcome != "dropped" for sample in window.samples) else ERROR, text
    if left_out.total() > WORTH_A_WARNING * window.received:
        reason = window.latest_reason(left_out.most_common(1)[0][0]).removesuffix(f": {LEFT_OUT}")
        text = f"{left_out.total()} of {window.received} images were left out {span}: {reason}; {_STAMPS}"
        yield WARN if window.infos or not window.full else ERROR, text


def _without_flow(window: Window, span: str) -> Iterator[Trouble]:
    """Why nothing comes out, although images have come all the time."""
    starts = Counter(sample.kind for sample in window.samples if sample.outcome == "first")
    if starts.total() > 1:
        most = starts.most_common(1)[0][0]
        remedy = _remedy(most) or "see `reason` in ~/statistics"
        why = f"the stream started anew {starts.total()} times, most because: {window.latest_reason(most)}"
        yield WARN, f"no flow {span}: {why}; {remedy}"
    elif window.drops[SUPERSEDED] and not window.drops.keys() - set(BY_DESIGN):
        text = (
            f"no flow {span}: the worker is not answering, so that all {window.drops[SUPERSEDED]} images were "
            "superseded by newer ones; a pair takes longer than this (set latency_budget_ms, or lower max_scale), "
            "or it hangs: restart the node, and see its log"
        )
        yield ERROR, text


def _remedy(reason: str) -> str:
    return next((text for word, text in _REMEDIES.items() if word in reason), "")


def _faults(faulty: Sequence[bool], share: float = WORTH_A_WARNING) -> range:
    """Which of these are worth a word: the last ones in a row, or all where it is so time and again; or none."""
    row = len(list(takewhile(bool, reversed(faulty))))
    times = sum(now and not before for before, now in pairwise([False, *faulty]))
    if row >= AT_ONCE:
        return range(len(faulty) - row, len(faulty))
    return range(len(faulty) if times >= AT_ONCE and times > share * len(faulty) else 0)


def _breaks(window: Window, span: str) -> Iterator[Trouble]:
    """Of a stream that starts anew with each image at present, or again and again, for a reason that has a remedy."""
    taken = [sample for sample in window.samples if sample.outcome != "dropped"]
    faults = _faults([sample.outcome == "first" and bool(_remedy(sample.kind)) for sample in taken])
    if faults:
        starts = Counter(taken[number].kind for number in faults if taken[number].outcome == "first")
        most = starts.most_common(1)[0][0]
        what = f"the stream started anew {starts.total()} times {span}, most because"
        if faults.start or starts.total() == len(taken):
            what = f"no flow from the last {len(faults)} images, because"
        yield WARN, f"{what}: {window.latest_reason(most)}; {_remedy(most)}"


def _doubtful(window: Window, span: str) -> Iterator[Trouble]:
    """Of flow that was published and means nothing, or that is zero because the camera gave no new image."""
    nothing = (
        "mean nothing (`matched` is false in ~/statistics), as their images have nothing in common: is the lens "
        f"covered, the motion too fast, or {_OTHER_CAMERA}"
    )
    same = (
        "were exactly those before them, so that their flow is zero whatever moves: is the camera frozen, or does its "
        "driver send each image more than once? (A simulated camera that stands still has no noise, and encoders of "
        "video leave out what hardly differs.)"
    )
    for faulty, share, what, words in (
        ([not info.matched for info in window.infos], WORTH_A_WARNING, "flow fields", nothing),
        ([info.repeated for info in window.infos], REPEATED_SHARE, "images", same),
    ):
        if looked_at := _faults(faulty, share):
            count = sum(faulty[number] for number in looked_at)
            some = f"{count} of {len(looked_at)} {what} {span}"
            yield WARN, f"{f'the last {count} {what}' if count == len(looked_at) else some} {words}"


def _solves(window: Window, span: str) -> Iterator[Trouble]:
    infos, count = window.infos, len(window.infos)
    diverged = sum(info.stop_reason == "diverged" for info in infos)
    if diverged:
        text = f"the solver diverged {diverged} times in {count} pairs {span}; are the weights the right ones?"
        yield ERROR if 2 * diverged > count else WARN, text
    late, lately = [info for info in infos if info.over_budget], infos[-LATELY:]  # the budget may have changed since
    if late and sum(info.starved for info in lately) >= STARVED_SHARE * LATELY:
        text = (
            f"the budget of {late[-1].budget_ms:g} ms cannot be met ({len(late)} of {count} flow fields were late "
            f"{span}): one iteration at the lowest scale takes longer; {UNMET_REMEDY}"
        )
        yield WARN, text
    elif len(late) > WORTH_A_WARNING * count:
        text = (
            f"{len(late)} of {count} flow fields came after the budget of {late[-1].budget_ms:g} ms {span} "
            f"(mean wait before processing {window.stage_means.get('wait', 0.0):.0f} ms); is another process keeping "
            "the processor busy? See `threads`, or raise latency_budget_ms"
        )
        yield WARN, text
    superseded = window.drops[SUPERSEDED]
    if infos and superseded > WORTH_A_WARNING * window.received:
        yield OK, f"{superseded} of {window.received} images were superseded by newer ones: slower than the camera"


def _stamps(window: Window, clocks: Clocks) -> Iterator[Trouble]:
    """Stamps of a recording are no fault: nothing but their age depends on this machine's clock."""
    if clocks.simulated and not clocks.offered:
        yield OK, "use_sim_time is set, and nobody publishes /clock: how old the images are is not known"
        return
    ages_ms = window.ages_ms
    by_ours = window.full and not (clocks.simulated or clocks.offered or clocks.played)
    drift = _drift(ages_ms, window.seconds) if by_ours else 0.0
    if abs(drift) > MOST_DRIFT:
        advance = f"stamps advance by {1 - drift:.3g} s in a second"
        others = "or those of a simulation, for which use_sim_time is to be set"
        yield WARN, f"{advance}: in another unit, {others}, or the images take ever longer to arrive"
        return
    age_ms = float(np.median(ages_ms)) if ages_ms else 0.0
    if (EARLY_CLOCK_MS if clocks.simulated else EARLY_STAMP_MS) <= age_ms <= OLD_STAMP_MS:
        return
    stamps = f"stamps are {_duration(abs(age_ms))} {'old on arrival' if age_ms > 0 else 'in the future'}"
    if clocks.simulated:
        yield WARN, f"{stamps} by /clock: it and the images do not belong to one recording"
    elif clocks.offered:
        yield WARN, f"{stamps}, and /clock is published: set use_sim_time, so that ages are counted by it"
    elif clocks.played:
        yield OK, f"{stamps}, as those of a recording are"
    elif age_ms > ANOTHER_TIME_MS:
        yield OK, f"{stamps}: those of a recording, or of a camera whose clock was never set"
    else:
        yield WARN, f"{stamps}: synchronise the clocks of the camera and of this machine"


def _drift(ages_ms: Sequence[float], seconds: float) -> float:
    """By how many seconds stamps fall behind in a second all the time; 0 for a single odd stamp or step of a clock."""
    if len(ages_ms) < 3 * AT_ONCE:
        return 0.0
    first, middle, last = (float(np.median(third)) for third in np.array_split(ages_ms, 3))
    steps_ms = middle - first, last - middle
    return 3e-3 * min(steps_ms, key=abs) / seconds if steps_ms[0] * steps_ms[1] > 0 else 0.0


def _duration(ms: float) -> str:
    """In the largest unit that it has at least two of: "3.2 s", "5.0 days"."""
    unit, length_ms = next(((unit, length) for unit, length in _UNITS_MS if ms >= 2 * length), _UNITS_MS[-1])
    return f"{ms / length_ms:.1f} {unit}"
