# SPDX-License-Identifier: Apache-2.0
"""Evaluates one recording with all settings, in one pass over its frames."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deq_flow_ros.evaluation.inputs import InputFrame, TopicTruth, Truth, folder_truth, scene_truth, unlike_number
from deq_flow_ros.evaluation.methods import Models, ReverseFlow, Setting, make_estimator
from deq_flow_ros.evaluation.records import DROPPED, FIRST, PROCESSED, FrameOutcome, read_frames
from deq_flow_ros.evaluation.report import FRAMES
from deq_flow_ros.evaluation.results import BAG, ResultFolder, ResultWriter
from deq_flow_ros.evaluation.runs import SettingRun, SimulatedRun, measure_setting
from deq_flow_ros.evaluation.summary import RunInfo, SettingEntry, count_words
from deq_flow_ros.host import StopRequest, TimeShares, versions
from deq_flow_ros.imaging.encodings import Levels
from deq_flow_ros.imaging.frame import MediaError
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.recordings.files import files_below, sha256
from deq_flow_ros.recordings.flow_bag import FlowBag, check_space
from deq_flow_ros.recordings.source import Source
from deq_flow_ros.recordings.sources import open_source
from deq_flow_ros.stamps import longest_gap_ms
from deq_flow_ros.streaming import EstimatorSettings
from deq_flow_ros.streaming.clock import CostTable, VirtualClock

Show = Callable[[int, "int | None", FrameOutcome], None]
"""Called for every frame of the main setting with the number of frames done, their number if known, and the outcome."""


@dataclass(frozen=True)
class Plan:
    """How recordings are evaluated: what the options of ``evaluate_bag`` say.

    :ivar settings: the first one is the main one, whose flow is recorded.
    :ivar mode: "offline" (every frame) or "realtime" (as on a robot, simulated).
    :ivar stamps: see ``InputFrame.of``; None: those of the header.
    :ivar stop_s: end of the part to evaluate; None: the end of the recording.
    :ivar truth: a folder of flow files, or a topic of the bag.
    :ivar costs: cost tables of an earlier run, by setting; None: they are measured.
    """

    settings: tuple[Setting, ...]
    mode: str = "offline"
    topic: str | None = None
    fps: float | None = None
    stamps: str | None = None
    max_frames: int = 0
    start_s: float = 0.0
    stop_s: float | None = None
    consistency_every: int = 10
    truth: str | None = None
    storage: str = "mcap"
    bag: bool = True
    images: bool = False
    costs: dict[str, Any] | None = None

    @property
    def truth_topic(self) -> str | None:
        """The topic of the true flow, if it comes from a topic."""
        return self.truth if self.truth and self.truth.startswith("/") and not Path(self.truth).is_dir() else None


class RecordingEvaluation:
    """Evaluates one recording into a folder of its own, which is locked until it is closed.

    :param resume, overwrite: see ``ResultFolder``.
    :raises MediaError: for an unusable input or folder.
    """

    def __init__(self, path: str, out: Path, plan: Plan, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.out, self.plan = os.path.expanduser(path), out, plan
        self.source = self._open()
        self.source.close()  # it is read later, and not if the folder is unusable
        if self.source.live:
            raise MediaError(f"{self.source.description}: a camera cannot be read again; evaluate it with --live")
        if plan.stamps and (kind := self.source.kind) != "bag":
            raise MediaError(f"stamps of the {plan.stamps} were asked for, but {path} is a {kind}; only bags have them")
        for source in filter(None, (self.path, None if plan.truth_topic else plan.truth)):
            read, write = Path(source).resolve(), out.resolve()
            if read == write or read in write.parents or write in read.parents:
                inside = f"the input {read} and the results {write} lie inside of each other"
                raise MediaError(f"{inside}; choose another --out")
        self._shares = TimeShares()
        self._problems: dict[str, tuple[int, str]] = {}
        self._costs: dict[str, Any] = {}
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files_below(Path(self.path))]
        identity = {"input": stats, "plan": asdict(plan), "version": versions().get("deq_flow_ros", "")}
        self.folder = ResultFolder(out, json.loads(json.dumps(identity)), resume, overwrite)

    def _open(self) -> Source:
        plan = self.plan
        stop_s = math.inf if plan.stop_s is None else plan.stop_s
        return open_source(self.path, plan.topic, plan.fps, plan.start_s, stop_s)

    @property
    def frames(self) -> int | None:
        """The number of frames to evaluate, if it is known."""
        count, limit = self.source.count, self.plan.max_frames
        return min(count, limit) if count and limit else limit or count

    def run(self, models: Models, show: Show, stop: StopRequest) -> dict[str, Any]:
        """Evaluate the recording until it ends or a stop is requested; returns the metrics.

        :raises MediaError: if no frame can be read, or results cannot be written. Results so far are kept.
        """
        plan, frames, done, runs = self.plan, self._input_frames(), 0, []
        frame = next(frames, None)
        # The uncertainty is recorded if the weights have a head for it. All settings compute it, so times compare.
        headed = {network for network, model in models.items() if plan.bag and model.uncertainty is not None}
        gap_ms = longest_gap_ms(EstimatorSettings().max_gap_ms, self.source.nominal_period_ns)
        chosen = [
            replace(one, uncertainty=one.uncertainty or one.network in headed, max_gap_ms=one.max_gap_ms or gap_ms)
            for one in plan.settings
        ]
        if frame is not None:
            runs = [self._setting_run(setting, models) for setting in chosen]
            if plan.bag and frame.image is not None and self.frames:
                height, width = frame.image.shape[:2]
                check_space(self.out, self.frames, height, width, "leave the bag out with --no-bag", plan.images)
        settings = [SettingEntry(setting.name, asdict(setting), setting.note) for setting in chosen]
        self.folder.begin()
        state = self.folder.state
        bag = FlowBag(self.out / BAG, state, plan.storage, self.source.calibration) if plan.bag else None
        with stop.heeded():
            with ResultWriter(self.out, settings, state / "previews", bag, plan.images) as writer:

                def keep(run: SettingRun, outcomes: Iterator[FrameOutcome]) -> None:
                    for outcome in outcomes:
                        with self._shares.of("writing"):
                            writer.add(run.setting.name, outcome)
                        if run is runs[0]:
                            show(outcome.record.index + 1, self.frames, outcome)

                while frame is not None:
                    for run in runs:
                        keep(run, run.take(frame))
                    done = frame.index + 1
                    frame = None if stop.requested else next(frames, None)
                complete = not stop.requested
                for run in runs if complete else ():
                    keep(run, run.finish())
            metrics = writer.finish(self._info(done, complete, runs[0].played_s if runs else None))
            self.folder.finish(complete)
        return metrics

    def _input_frames(self) -> Iterator[InputFrame]:
        """The frames as RGB. If the recording breaks off, the frames end there and the problem is noted."""
        frames, previous = iter(self.source.frames()), None
        levels, stamps = Levels(), self.plan.stamps or "header"
        for index in range(self.plan.max_frames) if self.plan.max_frames else count():
            with self._shares.of("reading"):
                try:
                    frame = InputFrame.of(index, next(frames), stamps, self.source.left_out, levels)
                except StopIteration:
                    return
                except MediaError as error:
                    if previous is None:
                        raise
                    self._note("are followed by what cannot be read", f"frame {index - 1}: {error}")
                    return
            if frame.image is None:
                self._note("cannot be read", f"frame {index}: {frame.problem}")
            if previous is not None and frame.stamp_ns <= previous.stamp_ns:
                kind = "have a stamp that is not after the one before (see --stamps record)"
                self._note(kind, f"frame {index}: {frame.stamp_ns} ns after {previous.stamp_ns} ns")
            images = [one.image for one in (frame, previous) if one is not None and one.image is not None]
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in images]
            if len(set(sizes)) > 1:
                self._note("have another size than the one before", f"frame {index}: {' after '.join(sizes)}")
            yield frame
            previous = frame

    def _note(self, kind: str, what: str) -> None:
        number, first = self._problems.get(kind, (0, what))
        self._problems[kind] = number + 1, first

    def _setting_run(self, setting: Setting, models: Models) -> SettingRun:
        model = models.get(setting.network) if setting.solves else None
        clock = VirtualClock(self._cost_table(setting, model)) if self.plan.mode == "realtime" else None
        try:
            estimator = make_estimator(setting, model, clock)
        except ValueError as error:
            raise MediaError(f"the setting {setting.name} is impossible: {error}") from error
        every = self.plan.consistency_every
        reverse = ReverseFlow(setting, model, every) if every else None
        common = (setting, estimator, self._truth(), reverse, self._shares)
        if clock is not None:
            return SimulatedRun(clock, self.source.nominal_period_ns, *common)
        # Memory is taken and kernels are chosen before the first pair, whose time would show it.
        with contextlib.suppress(MediaError, ValueError):  # what is wrong is told when its turn comes
            warmed = make_estimator(setting, model, None)
            for stamp_ns, image in enumerate(self._first_images(2)[0]):
                warmed.update(image, stamp_ns)
        return SettingRun(*common)

    def _cost_table(self, setting: Setting, model: DEQFlow | None) -> CostTable:
        costs = self._costs if self.plan.costs is None else self.plan.costs
        if self.plan.costs is None:
            with self._shares.of("measuring costs"):
                images, convert_ms = self._first_images()
                costs[setting.name] = measure_setting(setting, model, images, convert_ms).plain()
        if setting.name not in costs:
            raise MediaError(f"the given costs are for {', '.join(costs)}, not for the setting {setting.name}")
        try:
            return CostTable.of(costs[setting.name])
        except ValueError as error:
            raise MediaError(str(error)) from error

    def _first_images(self, number: int = 20) -> tuple[list[np.ndarray], list[float]]:
        """The first images of equal size, and the times that it took to decode them."""
        levels, readable = Levels(), (frame for frame in self._open().frames() if not frame.problem)
        frames = [InputFrame.of(index, frame, levels=levels) for index, frame in enumerate(islice(readable, number))]
        found = [(frame.image, frame.convert_ms) for frame in frames if frame.image is not None]
        alike = [(image, ms) for image, ms in found if image.shape == found[0][0].shape][:8]
        return [image for image, _ in alike], [ms for _, ms in alike]

    def _truth(self) -> Truth | None:
        if self.plan.truth_topic is not None and self.source.kind == "bag":
            return TopicTruth(Path(self.path), self.plan.truth_topic, self._note_unreadable)
        return folder_truth(Path(self.plan.truth)) if self.plan.truth is not None else scene_truth(Path(self.path))

    def _note_unreadable(self, what: str) -> None:
        if what not in self.source.skipped:  # every setting reads the true flow by itself
            self.source.skipped.append(what)

    def _info(self, frames: int, complete: bool, played_s: float | None) -> RunInfo:
        skipped, noted = self.source.skipped, self._problems.items()
        sentences = skipped[:5] + ([f"and {len(skipped) - 5} more like these"] if len(skipped) > 5 else [])
        if self.source.odd_stamps and self.plan.stamps != "record":
            sentences.append(f"{self.source.odd_stamps} --stamps record takes the times of recording")
        sentences += [f"frames that {kind}: {number}; the first is {first}" for kind, (number, first) in noted]
        sentences, digest = sentences + (self._missing() if complete else []), ""
        # Only if the recording was read to its end. Reading the rest could take longer than the evaluation.
        if complete and self.frames == self.source.count and self.source.whole:
            with self._shares.of("reading"):
                try:
                    digest = sha256(Path(self.path))
                except OSError as error:
                    sentences.append(f"cannot read {self.path} again to take its SHA-256: {error}")
        description, topic = self.source.description, getattr(self.source, "topic", None)
        read = {"description": description, "path": self.path, "sha256": digest, "frames": frames, "topic": topic}
        return RunInfo(
            self.plan.mode, read, self._shares.seconds, played_s, self._shares.shares(),
            self._costs or self.plan.costs, sentences, complete=complete, threads=torch.get_num_threads(),
        )  # fmt: skip

    def _missing(self) -> list[str]:
        """What is missing in the results of a complete recording."""
        frames = read_frames(self.out / FRAMES)
        frames = frames[frames.setting == self.plan.settings[0].name]
        pairs = int((frames.outcome == PROCESSED).sum())
        if not pairs:
            reasons = (count_words(frames, "reason", FIRST) | count_words(frames, "reason", DROPPED)).items()
            why = "".join(f"; {count} x {reason}" for reason, count in reasons)
            return [f"none of the {len(frames)} frames gave flow, which needs two successive frames{why}"]
        if self.plan.truth is None or frames.epe_px.notna().any():
            of_whole = not self.plan.truth_topic and self.frames == self.source.count and self.source.whole
            return unlike_number(self.plan.truth, len(frames) + self.source.left_out) if of_whole else []
        expected = "its files must be forward flow between successive frames, from the first frame on"
        if self.plan.truth_topic:
            expected = "its messages must have the stamp of the image on whose pixels the flow is defined"
        return [f"the true flow {self.plan.truth} is known for none of the {pairs} pairs: {expected}"]
