# SPDX-License-Identifier: Apache-2.0
"""The outcomes of a run of the flow node that was recorded, held against what was played into it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np

from deq_flow_ros.demo.bag import ExactFlow
from deq_flow_ros.evaluation.inputs import InputFrame
from deq_flow_ros.evaluation.methods import ReverseFlow, Setting
from deq_flow_ros.evaluation.records import (
    DROPPED,
    PROCESSED,
    STAGES,
    FrameOutcome,
    FrameRecord,
    PairFields,
    consistency,
    measure,
)  # fmt: skip
from deq_flow_ros.imaging import MediaError, stamp_to_ns
from deq_flow_ros.imaging.encodings import Levels
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.recordings.bag_reader import read_messages
from deq_flow_ros.recordings.bags import FLOW_TOPIC, RESIDUAL_TOPIC, FrameReport, read_image
from deq_flow_ros.recordings.source import Source
from deq_flow_ros.streaming import FlowEstimator

STREAMED, COLD = "streamed", "cold"
"""Names of the settings: what the node did, and some of its pairs from a cold start."""
COLD_NOTE = "some of the same pairs from a cold start: same iterations, no deadline, plus a coarse-to-fine start"
OUT_OF_ORDER = 8
"""Fields that are recorded so many places later than their frame's turn are still found."""


def in_order(reports: Sequence[FrameReport], published_ns: Sequence[int]) -> list[FrameReport]:
    """The reports in the order in which their frames were published, which need not be that of their stamps."""
    places: defaultdict[int, deque[int]] = defaultdict(deque)
    for place, stamp_ns in enumerate(published_ns):
        places[stamp_ns].append(place)
    placed = [(places[one.stamp_ns].popleft() if places[one.stamp_ns] else len(published_ns), one) for one in reports]
    return [report for _, report in sorted(placed, key=lambda pair: pair[0])]


def changes(first_reasons: Mapping[str, int]) -> list[str]:
    """What of the images changed midway, so that the stream started anew, as an evaluation without a node names it."""
    return [
        f"images whose {reason}, where the stream started anew: {number}"
        for reason, number in first_reasons.items()
        if re.match("(size|encoding|frame_id) changed from ", reason)
    ]


def read_run(
    bag: Path, reports: Sequence[FrameReport], source: Source, exact: ExactFlow | None, roi: Sequence[int] = ()
) -> Iterator[FrameOutcome]:
    """Every reported frame in turn; with its fields where it was processed and they were recorded.

    Only what may still be asked for is kept in memory. Frames that could not be played, because a video has no picture
    for them, come last.

    :param bag: what the node published.
    :param reports: in the order of the stream.
    :param source: what was played.
    :param roi: x, y, width and height of the part of the images that the node processed; nothing: all of them.
    :raises MediaError: where recording, source and reports do not match.
    """
    finder, fields = _FrameFinder(source, roi), _FieldFinder(bag, reports)
    last: tuple[int, PairFields] | None = None
    for index, report in enumerate(reports):
        record = record_of(index, report)
        found = fields.take(report) if record.outcome == PROCESSED else None
        if found is None:
            yield FrameOutcome(record)  # where it was processed, the account of the run names it
            continue
        pair = _pair(report, *found, finder, exact)
        before = last[1] if last is not None and last[0] == record.previous_stamp_ns else None
        last = record.stamp_ns, pair
        yield FrameOutcome(replace(record, measures=measure(pair, before)), pair)
    reported = {report.stamp_ns for report in reports}
    unplayed = (frame for frame in finder.unreadable() if frame.stamp_ns not in reported)
    for index, frame in enumerate(unplayed, len(reports)):
        yield FrameOutcome(FrameRecord(index, frame.stamp_ns, DROPPED, frame.problem))


def record_of(index: int, report: FrameReport) -> FrameRecord:
    """What the node said of one frame."""
    if report.outcome != PROCESSED:
        return FrameRecord(index, report.stamp_ns, report.outcome, report.values.get("reason", ""))
    iterations, stages = report.number("iterations"), {stage: report.number(f"stage_{stage}_ms") for stage in STAGES}
    return FrameRecord(
        index,
        report.stamp_ns,
        PROCESSED,
        previous_stamp_ns=report.stamp("image1_stamp_ns"),
        iterations=int(iterations) if np.isfinite(iterations) else 0,
        stop_reason=report.values.get("stop_reason", ""),
        warm=report.flag("warm"),
        residual_px=report.number("residual_px"),
        reset_reason=report.values.get("reset_reason", ""),
        scale=report.number("scale"),
        stage_ms={stage: value for stage, value in stages.items() if np.isfinite(value)},
        latency_ms=report.number("latency_ms"),
        over_budget=report.flag("over_budget"),
        matched=report.values.get("matched") != "false",
        repeated=report.flag("repeated"),
    )


def look_closer(
    outcomes: Iterable[FrameOutcome], model: DEQFlow, direction: str, every: int
) -> Iterator[tuple[str, FrameOutcome]]:
    """The outcomes of ``read_run`` with the name of their setting, and more of one pair in ``every``.

    Such a pair is solved in the other direction, for the consistency of both, and once more from a cold start if the
    stream had a warm start there.
    """
    estimator = FlowEstimator(model, tolerance_px=None, direction=direction, max_gap_ms=3.6e6)
    reverse = ReverseFlow(Setting("other", direction=direction), model, every=1)
    found = -1
    for outcome in outcomes:
        pair = outcome.fields
        found += pair is not None
        if pair is None or found % every != every // 2:  # not the first pair, which is never warm
            yield STREAMED, outcome
            continue
        backward = reverse.of(outcome.record.index, pair.image1, pair.image2)
        if backward is not None:
            pair = replace(pair, backward=backward)
            measures = {**outcome.record.measures, **consistency(pair.flow, backward)}
            outcome = FrameOutcome(replace(outcome.record, measures=measures), pair)
        yield STREAMED, outcome
        if outcome.record.warm and (again := solve_cold(estimator, outcome.record, pair)) is not None:
            yield COLD, again


def solve_cold(estimator: FlowEstimator, record: FrameRecord, pair: PairFields) -> FrameOutcome | None:
    """A pair solved again from nothing, at the scale that the stream had for it, with as many iterations there.

    There is no deadline, so it always begins with a coarse-to-fine start, whose iterations at lower resolutions come in
    addition. None where the stream made no iteration.
    """
    if record.iterations < 1:
        return None
    estimator.reset("cold start")
    estimator.change(max_iterations=record.iterations, min_scale=record.scale, max_scale=record.scale)
    estimator.update(pair.image1, 0)
    result = estimator.update(pair.image2, 1)
    if result is None:
        return None
    again = replace(pair, flow=result.flow, residual=result.residual)
    # Its latency is that of another load and of no deadline, and not to be compared.
    info = replace(result.info, stamp_ns=record.stamp_ns, latency_ms=float("nan"), stage_ms={})
    cold = FrameRecord.of_flow(record.index, info, measure(again))
    return FrameOutcome(replace(cold, previous_stamp_ns=record.previous_stamp_ns), again)


def _pair(
    report: FrameReport, flow: np.ndarray, residual: np.ndarray, finder: _FrameFinder, exact: ExactFlow | None
) -> PairFields:
    first_ns, second_ns = report.stamp("image1_stamp_ns"), report.stamp("image2_stamp_ns")
    if first_ns is None or second_ns is None:
        raise MediaError(f"the report of the processed frame {report.stamp_ns} lacks the stamps of its two images")
    image1, image2 = finder.pair(first_ns, second_ns)
    pair = PairFields(image1, image2, flow, residual, direction="forward" if report.forward else "backward")
    if flow.shape[:2] != pair.here.shape[:2]:
        raise MediaError(
            f"expected flow of the image's size {pair.here.shape[:2]}, got {flow.shape[:2]} for frame {second_ns}"
        )
    if exact is None:
        return pair
    truth, visible = exact(*((first_ns, second_ns) if report.forward else (second_ns, first_ns)))
    return replace(pair, truth=finder.part(truth), visible=finder.part(visible))


class _FieldFinder:
    """Finds flow and residual of a frame while reading the recording once."""

    def __init__(self, bag: Path, reports: Sequence[FrameReport]) -> None:
        self._messages = read_messages(bag, FLOW_TOPIC, RESIDUAL_TOPIC)
        self._wanted = Counter(report.flow_stamp_ns for report in reports if report.outcome == PROCESSED)
        self._waiting: dict[int, dict[str, np.ndarray]] = {}
        """By stamp, and by topic."""

    def take(self, report: FrameReport) -> tuple[np.ndarray, np.ndarray] | None:
        """(flow, residual) of a processed frame; None where they were not recorded. To be asked for in their order."""
        wanted = report.flow_stamp_ns
        if wanted is None:
            return None
        while len(self._waiting.get(wanted, ())) < 2 and len(self._waiting) <= OUT_OF_ORDER:
            topic, _, message = next(self._messages, ("", 0, None))
            if message is None:
                break
            self._waiting.setdefault(stamp_to_ns(message.header.stamp), {})[topic] = read_image(message)
        self._wanted[wanted] -= 1
        taken = self._waiting.pop(wanted, {})
        self._waiting = {stamp_ns: both for stamp_ns, both in self._waiting.items() if self._wanted[stamp_ns] > 0}
        return (taken[FLOW_TOPIC], taken[RESIDUAL_TOPIC]) if len(taken) == 2 else None


class _FrameFinder:
    """Finds frames of a source by stamp while reading it once; only what may still be asked for is kept."""

    def __init__(self, source: Source, roi: Sequence[int]) -> None:
        self._roi = roi
        levels = Levels()
        self._frames = (InputFrame.of(n, frame, levels=levels) for n, frame in enumerate(source.frames()))
        self._kept: dict[int, InputFrame] = {}
        self._unreadable: list[InputFrame] = []

    def pair(self, first_ns: int, second_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of two stamps, (H, W, 3) uint8 RGB; pairs must be asked for in the order of the stream."""
        while first_ns not in self._kept or second_ns not in self._kept:
            frame = next(self._frames, None)
            if frame is None:
                raise MediaError(f"the input holds no frames stamped {first_ns} and {second_ns} ns, in this order")
            self._kept[frame.stamp_ns] = frame
            if frame.image is None:
                self._unreadable.append(frame)
        for stamp in list(self._kept):
            if stamp == first_ns:
                break
            del self._kept[stamp]
        return self._image(first_ns), self._image(second_ns)

    def unreadable(self) -> list[InputFrame]:
        """The frames so far, and those that follow at once, that have no image."""
        return [*self._unreadable, *takewhile(lambda frame: frame.image is None, self._frames)]

    def _image(self, stamp_ns: int) -> np.ndarray:
        frame = self._kept[stamp_ns]
        if frame.image is None:
            raise MediaError(f"the frame stamped {stamp_ns} ns was processed, but cannot be read here: {frame.problem}")
        return self.part(frame.image)

    def part(self, array: np.ndarray) -> np.ndarray:
        """The part of an image or field that the node processed."""
        if not any(self._roi):
            return array
        x, y, width, height = self._roi
        return np.ascontiguousarray(array[y : y + height, x : x + width])
