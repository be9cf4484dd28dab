# SPDX-License-Identifier: Apache-2.0
"""A run of the flow node that was recorded, held against its input: the records and fields of its frames."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros.evaluation.gallery import Gallery
from deq_flow_ros.evaluation.measures import consistency, measure
from deq_flow_ros.evaluation.report import FRAMES, write_outputs
from deq_flow_ros.evaluation.results import PROCESSED, STAGES, FrameRecord, FrameTable, PairFields, Results
from deq_flow_ros.evaluation.runner import Backward
from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.evaluation.summary import RunInfo, Shares
from deq_flow_ros.media.encodings import EncodingError, to_rgb
from deq_flow_ros.media.flow_recording import FrameReport, read_fields
from deq_flow_ros.media.frame import Frame, MediaError, Source
from deq_flow_ros.model import load_model
from deq_flow_ros.streaming import FlowEstimator

ExactFlow = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""(stamp on whose pixels the flow lives, stamp it leads to) -> (flow (H, W, 2) px, visible (H, W) bool)."""
Done = tuple[FrameRecord, "PairFields | None"]

COLD = "some of the same pairs from a cold start: same iterations, no deadline, plus a coarse-to-fine start"
PREVIEWS = ".previews"
"""Folder beside the results with the pictures of the report while it is made."""
OUT_OF_ORDER = 8
"""Fields that are recorded so many places later than their frame's turn are still found."""


@dataclass(frozen=True)
class Recording:
    """Where the node's outputs were recorded: a bag, and the names of its topics."""

    bag: Path
    flow: str
    residual: str


def read_run(
    recording: Recording, reports: Sequence[FrameReport], source: Source, exact: ExactFlow | None
) -> Iterator[Done]:
    """Every reported frame in the order of its stamp; with its fields where it was processed and they were recorded.

    `source` is what was played. Only what may still be asked for is kept. Raises `MediaError` where recording, source
    and reports do not match.
    """
    finder, fields = _FrameFinder(source), _FieldFinder(recording)
    last: tuple[int, PairFields] | None = None
    for index, report in enumerate(sorted(reports, key=lambda report: report.stamp_ns)):
        record = record_of(index, report)
        found = fields.take(report) if record.outcome == PROCESSED else None
        if found is None:
            yield record, None  # where it was processed, the account names it
            continue
        pair = _pair(report, *found, finder, exact)
        before = last[1] if last is not None and last[0] == record.previous_stamp_ns else None
        last = record.stamp_ns, pair
        yield replace(record, measures=measure(pair, before)), pair


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
    )


def solve_cold(estimator: FlowEstimator, record: FrameRecord, pair: PairFields) -> Done | None:
    """A pair solved again from nothing, at the scale that the stream had for it, with as many iterations there.

    Without a deadline, so always from a coarse-to-fine start, whose iterations at lower resolutions come on top. None
    where the stream made no iteration.
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
    # Its latency is that of another load and of no deadline: not to be compared.
    info = replace(result.info, stamp_ns=record.stamp_ns, latency_ms=float("nan"), stage_ms={})
    cold = FrameRecord.of_flow(record.index, info, measure(again))
    return replace(cold, previous_stamp_ns=record.previous_stamp_ns), again


def evaluate_run(
    out: Path, done: Iterable[Done], settings: Mapping[str, Any], note: str, every: int, about: RunInfo
) -> dict[str, Any] | None:
    """Write the results of a run from its frames, as `read_run` yields them; returns the metrics.

    One of `every` pairs is looked at more closely: it is solved in the other direction, for the consistency of both,
    and, if the stream had a warm start there, once more from a cold one. None, and nothing is written, where no frame
    has flow.

    :param settings: those of the node, for people; `model`, `device`, `precision` and `direction` among them.
    :param note: they in a few words.
    """
    shares, previews, found = Shares(), out / PREVIEWS, 0
    shutil.rmtree(previews, ignore_errors=True)
    model = load_model(settings["model"], settings["device"], precision=settings["precision"])
    estimator = FlowEstimator(model, tolerance_px=None, direction=settings["direction"], max_gap_ms=3.6e6)
    backward = Backward(Setting("other", direction=settings["direction"]), model, every=1)
    try:
        with FrameTable(out / FRAMES) as table:
            main = Results("streamed", settings, table, Gallery(previews / "0"), note)
            cold = Results("cold", {**settings, "warm": False, "budget_ms": None}, table, Gallery(previews / "1"), COLD)
            for record, pair in done:
                closely = pair is not None and found % every == every // 2  # not the first, which is never warm
                if pair is not None and closely:
                    record, pair = _with_consistency(record, pair, backward)
                main.add(record, pair)
                if pair is None:
                    continue
                found += 1
                if record.warm and closely and (again := solve_cold(estimator, record, pair)) is not None:
                    cold.add(*again)
            if not found:
                return None
            about.seconds = shares.seconds
            return write_outputs(out, [main, cold] if len(cold.series()) else [main], about)
    finally:
        shutil.rmtree(previews, ignore_errors=True)


def _with_consistency(record: FrameRecord, pair: PairFields, backward: Backward) -> tuple[FrameRecord, PairFields]:
    other = backward.of(record.index, pair.image1, pair.image2)
    if other is None:
        return record, pair
    measures = {**record.measures, **consistency(pair.flow, other)}
    return replace(record, measures=measures), replace(pair, backward=other)


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
    return replace(pair, truth=truth, visible=visible)


class _FieldFinder:
    """Finds flow and residual of a frame while reading the recording once."""

    def __init__(self, recording: Recording) -> None:
        self._fields = read_fields(recording.bag, recording.flow, recording.residual)
        self._waiting: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def take(self, report: FrameReport) -> tuple[np.ndarray, np.ndarray] | None:
        """(flow, residual) of a processed frame; None where they were not recorded. In the order of the stream."""
        wanted = report.flow_stamp_ns
        if wanted is None:
            return None
        while wanted not in self._waiting and len(self._waiting) < OUT_OF_ORDER:
            found = next(self._fields, None)
            if found is None:
                break
            self._waiting[found[0]] = found[1:]
        for stamp_ns in [stamp_ns for stamp_ns in self._waiting if stamp_ns < wanted]:
            del self._waiting[stamp_ns]
        return self._waiting.pop(wanted, None)


class _FrameFinder:
    """Finds frames of a source by stamp while reading it once; only what may still be asked for is kept."""

    def __init__(self, source: Source) -> None:
        self._frames = source.frames()
        self._kept: dict[int, Frame] = {}

    def pair(self, first_ns: int, second_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of two stamps, (H, W, 3) uint8 RGB; pairs must be asked for in the order of the stream."""
        while first_ns not in self._kept or second_ns not in self._kept:
            frame = next(self._frames, None)
            if frame is None:
                raise MediaError(f"the input holds no frames stamped {first_ns} and {second_ns} ns, in this order")
            self._kept[frame.stamp_ns] = frame
        for stamp in list(self._kept):
            if stamp == first_ns:
                break
            del self._kept[stamp]
        return self._rgb(first_ns), self._rgb(second_ns)

    def _rgb(self, stamp_ns: int) -> np.ndarray:
        frame = self._kept[stamp_ns]
        try:
            return to_rgb(frame.data, frame.height, frame.width, frame.step, frame.encoding, frame.is_bigendian)
        except EncodingError as error:
            raise MediaError(
                f"the frame stamped {stamp_ns} ns was processed, but cannot be read here: {error}"
            ) from error
