# SPDX-License-Identifier: Apache-2.0
"""Words for what is not as it should be with a camera's frames: what it is, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TypeAlias

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus

from deq_flow_ros.ros import qos
from deq_flow_ros.ros.accounts import BY_DESIGN, LATELY, STARVED_SHARE, SUPERSEDED, Window
from deq_flow_ros.ros.budget import UNMET_REMEDY
from deq_flow_ros.streaming.continuity import FLAT, LEFT_OUT
from deq_flow_ros.streaming.result import REPEATED_SHARE

Trouble: TypeAlias = tuple[bytes, str]
"""A level, and what is wrong and what to do."""
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


def troubles(window: Window, clocks: Clocks) -> list[Trouble]:
    """All that is worth a word, the worst first; what is no fault is OK."""
    span = f"in the last {window.seconds:.0f} s"
    found = [*_unusable(window, span), *_left_out(window, span)]
    found += _without_flow(window, span) if window.full and not window.infos else _breaks(window, span)
    found += [*_unmatched(window, span), *_repeated(window, span), *_solves(window, span)]
    found += [*_transport(window, span), *_stamps(window, clocks)]
    return sorted(found, key=lambda trouble: trouble[0], reverse=True)


def _unusable(window: Window, span: str) -> Iterator[Trouble]:
    kinds = Counter({kind: count for kind, count in window.drops.items() if not _is_accepted(kind)})
    if kinds:
        most, count = kinds.most_common(1)[0]
        why = "because" if len(kinds) == 1 else f"{count} of them because"
        usable = any(sample.outcome != "dropped" for sample in window.samples)
        text = f"{kinds.total()} images could not be used {span}, {why}: {window.latest_reason(most)}"
        yield WARN if usable else ERROR, text


def _is_accepted(kind: str) -> bool:
    """Whether a drop is meant to be, or is judged by ``_left_out``."""
    return kind in BY_DESIGN or kind.endswith(LEFT_OUT)


def _left_out(window: Window, span: str) -> Iterator[Trouble]:
    """Of images that do not fit into the order of the stamps: a single one is no matter."""
    kinds = Counter({kind: count for kind, count in window.drops.items() if kind.endswith(LEFT_OUT)})
    if kinds.total() > WORTH_A_WARNING * window.received:
        reason = window.latest_reason(kinds.most_common(1)[0][0]).removesuffix(f": {LEFT_OUT}")
        text = f"{kinds.total()} of {window.received} images were left out {span}: {reason}; {_STAMPS}"
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


def _unmatched(window: Window, span: str) -> Iterator[Trouble]:
    """Of flow that was published and means nothing."""
    faults = _faults([not info.matched for info in window.infos])
    if faults:
        count = sum(not window.infos[number].matched for number in faults)
        of_all = f"{count} of {len(faults)} flow fields {span}"
        which = f"the last {count} flow fields" if count == len(faults) else of_all
        text = (
            f"{which} mean nothing (`matched` is false in ~/statistics), as their images have nothing in "
            f"common: is the lens covered, the motion too fast, or {_OTHER_CAMERA}"
        )
        yield WARN, text


def _repeated(window: Window, span: str) -> Iterator[Trouble]:
    """Of flow that is zero because the camera gave no new image."""
    faults = _faults([info.repeated for info in window.infos], REPEATED_SHARE)
    if faults:
        count = sum(window.infos[number].repeated for number in faults)
        which = f"the last {count} images" if count == len(faults) else f"{count} of {len(faults)} images {span}"
        text = (
            f"{which} were exactly those before them, so that their flow is zero whatever moves: is the camera frozen, "
            "or does its driver send each image more than once? (A simulated camera that stands still has no noise, "
            "and encoders of video leave out what hardly differs.)"
        )
        yield WARN, text


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


def _transport(window: Window, span: str) -> Iterator[Trouble]:
    if window.lost > WORTH_A_WARNING * (window.received + window.lost):
        yield WARN, f"{window.lost} images were lost on the way {span}: {qos.transport_advice()}"


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
