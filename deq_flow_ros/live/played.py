# SPDX-License-Identifier: Apache-2.0
"""The records of a run of the flow node that was recorded, held against what was played into it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deq_flow_ros.demo import ExactFlow
from deq_flow_ros.evaluation.methods import ReverseFlow, Setting
from deq_flow_ros.evaluation.records import (
    DROPPED,
    FIRST,
    PROCESSED,
    STAGES,
    FrameRecord,
    InputFrame,
    PairFields,
    consistency,
    measure,
)
from deq_flow_ros.imaging import MediaError, stamp_to_ns
from deq_flow_ros.imaging.encodings import Levels
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.recordings.bag_reader import read_messages
from deq_flow_ros.recordings.bags import FLOW_TOPIC, RESIDUAL_TOPIC, FrameReport, read_image
from deq_flow_ros.recordings.source import Source
from deq_flow_ros.streaming import FlowEstimator, FlowInfo

STREAMED, COLD = "streamed", "cold"
"""Names of the settings: what the node did, and some of its pairs from a cold start."""
COLD_NOTE = "some of the same pairs from a cold start: same iterations, no deadline, plus a coarse-to-fine start"
OUT_OF_ORDER = 8
"""Fields that are recorded so many places later than their frame's turn are still found."""


def read_run(
    bag: Path, published_ns: Sequence[int], reports: Sequence[FrameReport], source: Source, exact: ExactFlow | None,
    roi: Sequence[int] = (),
) -> Iterator[FrameRecord]:  # fmt: skip
    """Every frame that was played, in its turn: what the node said of it, with its fields where they were recorded.

    A frame that could not be played, because a video has no picture for it, is dropped, and its record has ``frame``.

    :param bag: what the node published.
    :param published_ns: the stamps of the frames that the player published.
    :param reports: in the order of their arrival.
    :param source: what was played.
    :param exact: gives the true flow, if it is known.
    :param roi: x, y, width and height of the part of the images that the node processed; nothing: all of them.
    :raises MediaError: where recording, source and reports do not match.
    """
    x, y, width, height = roi or (0, 0, None, None)
    part = (slice(y, height and y + height), slice(x, width and x + width))
    played, waiting = Counter(published_ns), defaultdict(list)
    for report in reversed(reports):
        waiting[report.stamp_ns].append(report)
    fields, levels = _FieldFinder(bag, reports), Levels()
    previous: tuple[int, np.ndarray] | None = None  # stamp and image of the last frame that began or continued a stream
    last: tuple[int, PairFields] | None = None
    for index, each in enumerate(source.frames()):
        frame = InputFrame.of(index, each, levels=levels)
        if not played[frame.stamp_ns]:
            if frame.image is None:
                yield FrameRecord(index, frame.stamp_ns, DROPPED, frame.problem, frame=frame)
            elif not played.total():
                break
            continue
        played[frame.stamp_ns] -= 1
        if not waiting[frame.stamp_ns]:
            continue  # the account of the run names it
        report = waiting[frame.stamp_ns].pop()
        record = record_of(index, report)
        image = None if frame.image is None else np.ascontiguousarray(frame.image[part])
        found = fields.take(report) if record.outcome == PROCESSED else None
        if found is None:
            yield record  # where it was processed, the account of the run names it
        else:
            before_ns = report.stamp("image1_stamp_ns")
            if image is None or previous is None or previous[0] != before_ns:
                stamps = f"{before_ns} and {record.stamp_ns} ns"
                raise MediaError(f"the input holds no images that follow each other with the stamps {stamps}")
            direction = "forward" if report.forward else "backward"
            pair = PairFields(previous[1], image, *found, direction=direction)
            if pair.flow.shape != (*image.shape[:2], 2):
                raise MediaError(
                    f"expected flow of the image's size {image.shape[:2]}, got {pair.flow.shape[:2]} for frame {index}"
                )
            if exact is not None:
                here, there = (previous[0], record.stamp_ns) if report.forward else (record.stamp_ns, previous[0])
                truth, visible = exact(here, there)
                pair = replace(pair, truth=np.ascontiguousarray(truth[part]), visible=visible[part])
            before = last[1] if last is not None and last[0] == before_ns else None
            last = record.stamp_ns, pair
            yield replace(record, measures=measure(pair, before), fields=pair)
        if image is not None and record.outcome in (PROCESSED, FIRST):
            previous = record.stamp_ns, image
    for index, report in enumerate((one for left in waiting.values() for one in reversed(left)), len(published_ns)):
        if report.outcome == PROCESSED:
            raise MediaError(f"the input holds no frame stamped {report.stamp_ns} ns, of which the node published flow")
        yield record_of(index, report)  # the image of a camera was lost on its way to the recording


def record_of(index: int, report: FrameReport) -> FrameRecord:
    """What the node said of one frame."""
    values = report.values
    if report.outcome != PROCESSED:
        return FrameRecord(index, report.stamp_ns, report.outcome, values.get("reason", ""))
    iterations, budget_ms = report.number("iterations"), report.number("budget_ms")
    stages = {stage: report.number(f"stage_{stage}_ms") for stage in STAGES}
    info = FlowInfo(
        report.stamp_ns, report.stamp("image1_stamp_ns") or 0, "forward" if report.forward else "backward",
        iterations=int(iterations) if np.isfinite(iterations) else 0, stop_reason=values.get("stop_reason", ""),
        warm=report.flag("warm"), residual_px=report.number("residual_px"), reset_reason=values.get("reset_reason"),
        scale=report.number("scale"), stage_ms={name: ms for name, ms in stages.items() if np.isfinite(ms)},
        latency_ms=report.number("latency_ms"), budget_ms=budget_ms if np.isfinite(budget_ms) else None,
        likeness=report.number("likeness"), repeated=report.flag("repeated"),
    )  # fmt: skip
    return FrameRecord(index, report.stamp_ns, PROCESSED, info=info)


def look_closer(
    records: Iterable[FrameRecord], model: DEQFlow, direction: str, every: int
) -> Iterator[tuple[str, FrameRecord]]:
    """The records of ``read_run`` with the name of their setting, and more of one pair in ``every``.

    Such a pair is solved in the other direction, for the consistency of both, and once more from a cold start if the
    stream had a warm start there.
    """
    estimator = FlowEstimator(model, tolerance_px=None, direction=direction, max_gap_ms=3.6e6)
    reverse = ReverseFlow(Setting("other", direction=direction), model, every=1)
    found = -1
    for record in records:
        pair, info = record.fields, record.info
        found += pair is not None
        if pair is None or info is None or found % every != every // 2:  # not the first pair, which is never warm
            yield STREAMED, record
            continue
        backward = reverse.of(record.index, pair.image1, pair.image2)
        if backward is not None:
            pair = replace(pair, backward=backward)
            record = replace(record, measures={**record.measures, **consistency(pair.flow, backward)}, fields=pair)
        yield STREAMED, record
        if info.warm and (again := solve_cold(estimator, record.index, info, pair)) is not None:
            yield COLD, again


def solve_cold(estimator: FlowEstimator, index: int, info: FlowInfo, pair: PairFields) -> FrameRecord | None:
    """A pair solved again from nothing, at the scale that the stream had for it, with as many iterations there.

    There is no deadline, so it always begins with a coarse-to-fine start, whose iterations at lower resolutions come in
    addition. None where the stream made no iteration.
    """
    if info.iterations < 1:
        return None
    estimator.reset("cold start")
    estimator.change(max_iterations=info.iterations, min_scale=info.scale, max_scale=info.scale)
    estimator.update(pair.image1, 0)
    result = estimator.update(pair.image2, 1)
    if result is None:
        return None
    again = replace(pair, flow=result.flow, residual=result.residual)
    # Its latency is that of another load and of no deadline, and not to be compared.
    cold = replace(
        result.info, stamp_ns=info.stamp_ns, previous_stamp_ns=info.previous_stamp_ns, latency_ms=float("nan"),
        stage_ms={},
    )  # fmt: skip
    return FrameRecord(index, info.stamp_ns, PROCESSED, info=cold, measures=measure(again), fields=again)


class _FieldFinder:
    """Finds flow and residual of a frame while reading the recording once."""

    def __init__(self, bag: Path, reports: Sequence[FrameReport]) -> None:
        self._messages = read_messages(bag, FLOW_TOPIC, RESIDUAL_TOPIC)
        self._wanted = Counter(report.flow_stamp_ns for report in reports if report.outcome == PROCESSED)
        self._waiting: dict[int, dict[str, np.ndarray]] = {}  # by stamp, and by topic

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
