# SPDX-License-Identifier: Apache-2.0
"""Runs one setting on a stream of frames: a record of every frame, in order.

True flow, if there is any, comes from a folder of flow files or a rendered scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros.demo import exact_flow
from deq_flow_ros.evaluation.methods import Estimator, ReverseFlow, Setting
from deq_flow_ros.evaluation.records import (
    DROPPED,
    FIRST,
    PROCESSED,
    SOURCE,
    FrameRecord,
    InputFrame,
    PairFields,
    measure,
)
from deq_flow_ros.host import TimeShares
from deq_flow_ros.imaging import MediaError, Pace
from deq_flow_ros.recordings.files import natural_order, visible_files
from deq_flow_ros.recordings.flow_files import FLOW_SUFFIXES, read_flow
from deq_flow_ros.streaming.clock import OVERHEAD, VirtualClock
from deq_flow_ros.streaming.continuity import StampOrder, why_anew
from deq_flow_ros.streaming.interface import SUPERSEDED

KnownFlow = tuple[np.ndarray, "np.ndarray | None"]
"""Flow (H, W, 2) px, NaN where it is not known; and whether pixels are visible in both images, (H, W) bool, or None."""
Truth = Callable[[InputFrame, InputFrame, str], "KnownFlow | None"]
"""Takes the earlier frame, the later frame and the direction; returns the true flow, or None if it is not known."""


def scene_truth(bag: Path) -> Truth | None:
    """The exact flow of a rendered bag; None for any other input."""
    exact = exact_flow(bag)
    if exact is None:
        return None

    def truth(earlier: InputFrame, later: InputFrame, direction: str) -> KnownFlow:
        here, there = (earlier, later) if direction == "forward" else (later, earlier)
        return exact(here.header_ns, there.header_ns)

    return truth


def flow_files(folder: Path) -> list[Path]:
    """The flow files of a folder in natural order.

    :raises MediaError: if it is no folder, or holds none, or files of several formats, whose order nobody knows.
    """
    if not folder.is_dir():
        raise MediaError(f"expected a folder of flow files, got {folder}")
    files = natural_order(child for child in visible_files(folder) if child.suffix.lower() in FLOW_SUFFIXES)
    if not files:
        raise MediaError(f"the folder {folder} holds no flow file ({', '.join(FLOW_SUFFIXES)})")
    if len(formats := sorted({file.suffix.lower() for file in files})) > 1:
        raise MediaError(f"expected flow files of one format in {folder}, got {' and '.join(formats)}")
    return files


def unlike_number(folder: str | None, frames: int) -> list[str]:
    """Say if the ``folder`` of true flow, if any, has not as many files as there are pairs, or ``frames``."""
    if folder is None or (files := len(flow_files(Path(folder)))) in (frames - 1, frames):
        return []
    pairs = f"the recording has {frames} frames, which are {frames - 1} pairs"
    return [f"the true flow {folder} has {files} files, and {pairs}: is the first file the flow of the first pair?"]


def folder_truth(folder: Path) -> Truth:
    """True flow, forward and between successive frames, from files in natural order.

    :raises MediaError: see ``flow_files``.
    """
    files = flow_files(folder)

    def truth(earlier: InputFrame, later: InputFrame, direction: str) -> KnownFlow | None:
        if direction != "forward" or later.place != earlier.place + 1 or earlier.place >= len(files):
            return None
        file = files[earlier.place]
        flow, valid = read_flow(file)
        assert later.image is not None
        if flow.shape[:2] != later.image.shape[:2]:
            (height, width), (h, w) = later.image.shape[:2], flow.shape[:2]
            raise MediaError(f"expected true flow of the image's size {width}x{height}, got {w}x{h}: {file}")
        return np.where(valid[:, :, None], flow, np.float32(np.nan)), None

    return truth


class SettingRun:
    """Runs one setting, and processes every frame, whatever time it takes.

    :param truth: gives the true flow of a pair, if it is known.
    :param reverse: computes the flow in the other direction; None: the consistency is not measured.
    :ivar played_s: how long the stream has lasted so far, if frames come at their own pace.
    """

    played_s: float | None = None

    def __init__(
        self, setting: Setting, estimator: Estimator, truth: Truth | None = None, reverse: ReverseFlow | None = None,
        shares: TimeShares | None = None,
    ) -> None:  # fmt: skip
        self.setting, self.estimator, self.shares = setting, estimator, shares or TimeShares()
        self._truth, self._reverse = truth, reverse
        self._previous: InputFrame | None = None
        self._order = StampOrder()
        self._last: dict[int, PairFields] = {}  # the last pair by the stamp of its later frame

    def take(self, frame: InputFrame) -> Iterator[FrameRecord]:
        """Take the next frame. Yields the records that are complete by now, of it or of earlier frames."""
        reason = frame.problem if frame.image is None else self._order.why_out(frame.stamp_ns)
        if reason:
            yield from self.leave_out(_dropped(frame, reason))
        else:
            yield from self.queue(frame)

    def leave_out(self, dropped: FrameRecord) -> Iterator[FrameRecord]:
        """Take a frame that does not fit into the stream; see ``take``."""
        yield dropped

    def queue(self, frame: InputFrame) -> Iterator[FrameRecord]:
        """Take the next frame that fits into the stream; see ``take``."""
        yield self.process(frame)

    def finish(self) -> Iterator[FrameRecord]:
        """The remaining records, after the last frame."""
        return iter(())

    def process(self, frame: InputFrame, arrival_ns: int | None = None) -> FrameRecord:
        """Compute the flow of a frame, and measure it.

        :param arrival_ns: when the frame arrived, on the estimator's clock; None is now.
        """
        assert frame.image is not None
        if (last := self._previous) is not None:
            # Of two frames out of order, ``take`` has left out one; the estimator must not do so once more.
            if anew := why_anew(last.stamp_ns, frame.stamp_ns):
                self.estimator.reset(anew)
            for name in SOURCE:  # another camera, as in the node
                if (before := getattr(last, name)) != (now := getattr(frame, name)):
                    self.estimator.reset(f"{name} changed from {before!r} to {now!r}")
        try:
            with self.shares.of("computing"):
                result = self.estimator.update(frame.image, frame.stamp_ns, arrival_ns)
        except ValueError as error:  # the frame is too small; the stream stays as it was
            return _dropped(frame, str(error))
        if self.estimator.left_out:
            return _dropped(frame, self.estimator.left_out)
        previous, self._previous = self._previous, frame
        if result is None:
            reason = self.estimator.reset_reason or ""
            return FrameRecord(frame.index, frame.stamp_ns, FIRST, reason, frame=frame)
        assert previous is not None and previous.image is not None
        images, direction = (previous.image, frame.image), self.setting.direction
        with self.shares.of("measuring"):
            truth, visible = (self._truth and self._truth(previous, frame, direction)) or (None, None)
            backward = self._reverse.of(frame.index, *images) if self._reverse is not None else None
            fields = PairFields(
                *images, result.flow, result.residual, truth, visible, backward, direction, result.uncertainty
            )
            before = self._last.get(result.info.previous_stamp_ns)  # None at the beginning of a stream
            measures = measure(fields, before)
        self._last = {result.info.stamp_ns: fields}
        info = replace(result.info, stage_ms={"convert": frame.convert_ms, **result.info.stage_ms})
        return FrameRecord(frame.index, frame.stamp_ns, PROCESSED, "", info, measures, fields, frame)


def _dropped(frame: InputFrame, reason: str) -> FrameRecord:
    return FrameRecord(frame.index, frame.stamp_ns, DROPPED, reason, frame=frame)


class SimulatedRun(SettingRun):
    """Runs one setting as on a robot: of the frames that arrive while it works, only the newest is kept.

    They arrive at their stamps, on a clock that is advanced by measured costs only. Deadlines, scale and drops are
    therefore those of the machine on which the costs were measured, and the same costs give the same results again.

    :param period_ns: the time between frames if their stamps do not tell it.
    """

    def __init__(self, clock: VirtualClock, period_ns: int, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._clock, self._period_ns, self._pace = clock, period_ns, Pace(period_ns)
        self._waiting: tuple[InputFrame, int] | None = None
        self._behind: list[FrameRecord] = []  # of frames that came after the one that waits
        self._first_ns: int | None = None
        self._latest_ns = 0  # arrival of the frame that arrived last

    def queue(self, frame: InputFrame) -> Iterator[FrameRecord]:
        # Whether the previous frame is processed is known only now.
        if self._first_ns is None:
            assert frame.image is not None
            self.estimator.warm_up(*frame.image.shape[:2])  # as the node does in configure
            self._first_ns = self._latest_ns = self._clock.now_ns()
        # The arrival on the virtual clock: as long after the previous frame as the stamps say, without long gaps.
        self._latest_ns = arrival_ns = self._latest_ns + self._pace.step(frame.stamp_ns)[0]
        self.played_s = (arrival_ns - self._first_ns + self._period_ns) * 1e-9
        if self._waiting is not None:
            waiting, its_arrival_ns = self._waiting
            superseded = arrival_ns <= self._clock.now_ns()
            yield _dropped(waiting, SUPERSEDED) if superseded else self._work(waiting, its_arrival_ns)
            yield from self._behind
        self._waiting, self._behind = (frame, arrival_ns), []

    def leave_out(self, dropped: FrameRecord) -> Iterator[FrameRecord]:
        if self._waiting is None:
            yield dropped
        else:
            self._behind.append(dropped)  # records keep the order of the frames

    def finish(self) -> Iterator[FrameRecord]:
        if self._waiting is not None:
            yield self._work(*self._waiting)
            yield from self._behind
            self._waiting, self._behind = None, []

    def _work(self, frame: InputFrame, arrival_ns: int) -> FrameRecord:
        clock = self._clock
        clock.wait_until(arrival_ns)
        waited_ms = (clock.now_ns() - arrival_ns) / 1e6
        assert frame.image is not None
        pixels, start_ns = frame.image.shape[0] * frame.image.shape[1], clock.now_ns()
        clock.charge("convert", pixels)
        clock.charge(OVERHEAD, pixels)
        frame = replace(frame, convert_ms=(clock.now_ns() - start_ns) / 1e6)
        record = self.process(frame, arrival_ns)
        with self.shares.of("computing"):
            self.estimator.prepare()
        if (info := record.info) is None:
            return record
        return replace(record, info=replace(info, stage_ms={"wait": waited_ms, **info.stage_ms}))
