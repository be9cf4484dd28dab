# SPDX-License-Identifier: Apache-2.0
"""Evaluates one recording with all settings, in one pass over its frames."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deq_flow_ros.evaluation.methods import Models, ReverseFlow, Setting, make_estimator
from deq_flow_ros.evaluation.records import DROPPED, FIRST, PROCESSED, FrameRecord, InputFrame, read_frames
from deq_flow_ros.evaluation.report import FRAMES, SettingEntry
from deq_flow_ros.evaluation.results import BAG, ResultFolder, ResultWriter, RunInfo, count_words
from deq_flow_ros.evaluation.runs import SettingRun, SimulatedRun, folder_truth, scene_truth, unlike_number
from deq_flow_ros.host import StopRequest, TimeShares, versions
from deq_flow_ros.imaging import MediaError, longest_gap_ms
from deq_flow_ros.imaging.encodings import Levels
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.recordings import Source, open_source
from deq_flow_ros.recordings.bags import FlowBag, check_space
from deq_flow_ros.recordings.files import files_below, sha256
from deq_flow_ros.streaming import EstimatorSettings
from deq_flow_ros.streaming.clock import OVERHEAD, CostTable, VirtualClock
from deq_flow_ros.streaming.costs import ITERATION
from deq_flow_ros.streaming.interface import LARGEST_SCALE
from deq_flow_ros.streaming.plan import scale_ladder, scaled_size

Show = Callable[[int, FrameRecord], None]
"""Called for every frame of the main setting with the number of frames done, and its record."""
INDECISIVE = ("input", "bags", "out", "resume", "overwrite", "threads", "param", "compare")
"""Options of ``evaluate_bag`` that the results do not depend on, or only by the settings."""
COST_ROUNDS, LONGEST_S = 8, 4.0
"""Measurements of every stage at each scale; at one scale they end after so long, if there are at least three."""
IN_ORDER = "was the clock set back? If not, `ros2 bag convert` or `mcap sort` puts messages in the order of time"
"""What is said of a recording in another order. Sorted here, frames before and after a step of the clock would mix."""


class RecordingEvaluation:
    """Evaluates one recording into a folder of its own, which is locked until it is closed.

    :param options: those of ``evaluate_bag``, with the cost tables of an earlier run, if any, in ``costs``.
    :param settings: the first one is the main one, whose flow is recorded.
    :raises MediaError: for an unusable input or folder.
    """

    def __init__(self, path: str, out: Path, options: argparse.Namespace, settings: Sequence[Setting]) -> None:
        self.path, self.out, self._options, self._settings = os.path.expanduser(path), out, options, settings
        self.source = self._open()
        self.source.close()  # it is read later, and not if the folder is unusable
        if self.source.live:
            raise MediaError(f"{self.source.description}: a camera cannot be read again; evaluate it with --live")
        if options.stamps and (kind := self.source.kind) != "bag":
            asked = f"stamps of the {options.stamps} were asked for"
            raise MediaError(f"{asked}, but {path} is a {kind}; only bags have them")
        self._shares = TimeShares()
        self._problems: dict[str, tuple[int, str]] = {}
        self._costs: dict[str, Any] = {}
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files_below(Path(self.path))]
        plan = {name: value for name, value in vars(options).items() if name not in INDECISIVE}
        plan["settings"] = list(map(asdict, settings))
        identity = {"input": stats, "plan": plan, "version": versions().get("deq_flow_ros", "")}
        identity, inputs = json.loads(json.dumps(identity)), filter(None, (self.path, options.truth))
        self.folder = ResultFolder(out, identity, inputs, options.resume, options.overwrite)

    def _open(self) -> Source:
        options = self._options
        return open_source(self.path, options.topic, options.fps, options.start, options.stop or math.inf)

    @property
    def frames(self) -> int | None:
        """The number of frames to evaluate, if it is known."""
        count, limit = self.source.count, self._options.max_frames
        return min(count, limit) if count and limit else limit or count

    def run(self, models: Models, show: Show, stop: StopRequest) -> dict[str, Any]:
        """Evaluate the recording until it ends or a stop is requested; returns the metrics.

        :raises MediaError: if no frame can be read, or results cannot be written. Results so far are kept.
        """
        options, frames, done, runs = self._options, self._input_frames(), 0, []
        frame = next(frames, None)
        # The uncertainty is recorded if the weights have a head for it. All settings compute it, so times compare.
        headed = {network for network, model in models.items() if not options.no_bag and model.uncertainty is not None}
        gap_ms = longest_gap_ms(EstimatorSettings().max_gap_ms, self.source.nominal_period_ns)
        chosen = [
            replace(one, uncertainty=one.uncertainty or one.network in headed, max_gap_ms=one.max_gap_ms or gap_ms)
            for one in self._settings
        ]
        if frame is not None:
            runs = [self._setting_run(setting, models) for setting in chosen]
            if not options.no_bag and frame.image is not None and self.frames:
                height, width = frame.image.shape[:2]
                place = next(place for place in (self.out, *self.out.absolute().parents) if place.exists())
                check_space(place, self.frames, height, width, "leave the bag out with --no-bag", options.images)
        settings = [SettingEntry(setting.name, asdict(setting), setting.note) for setting in chosen]
        self.folder.begin()
        nursery, calibration = self.folder.state, self.source.calibration
        bag = None if options.no_bag else FlowBag(self.out / BAG, nursery, options.storage, calibration)
        with stop:
            with ResultWriter(self.folder, settings, bag, options.images) as writer:

                def keep(run: SettingRun, records: Iterator[FrameRecord]) -> None:
                    for record in records:
                        with self._shares.of("writing"):
                            writer.add(run.setting.name, record)
                        if run is runs[0]:
                            show(record.index + 1, record)

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
        levels, stamps = Levels(), self._options.stamps or "header"
        for index in range(self._options.max_frames) if self._options.max_frames else count():
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
                if frame.record_ns < previous.record_ns:
                    kind = f"are earlier than what precedes them in the recording ({IN_ORDER})"
                self._note(kind, f"frame {index}: {frame.stamp_ns} ns after {previous.stamp_ns} ns")
            yield frame
            previous = frame

    def _note(self, kind: str, what: str) -> None:
        number, first = self._problems.get(kind, (0, what))
        self._problems[kind] = number + 1, first

    def _setting_run(self, setting: Setting, models: Models) -> SettingRun:
        model = models.get(setting.network) if setting.solves else None
        clock = VirtualClock(self._cost_table(setting, model)) if self._options.realtime else None
        try:
            estimator = make_estimator(setting, model, clock)
        except ValueError as error:
            raise MediaError(f"the setting {setting.name} is impossible: {error}") from error
        every = self._options.consistency_every
        reverse = ReverseFlow(setting, model, every) if every else None
        folder = self._options.truth
        truth = scene_truth(Path(self.path)) if folder is None else folder_truth(Path(folder))
        common = (setting, estimator, truth, reverse, self._shares)
        if clock is not None:
            return SimulatedRun(clock, self.source.nominal_period_ns, *common)
        # Memory is taken and kernels are chosen before the first pair, whose time would show it.
        with contextlib.suppress(MediaError, ValueError):  # what is wrong is told when its turn comes
            warmed = make_estimator(setting, model, None)
            for stamp_ns, image in enumerate(self._first_images(2)[0]):
                warmed.update(image, stamp_ns)
        return SettingRun(*common)

    def _cost_table(self, setting: Setting, model: DEQFlow | None) -> CostTable:
        costs = self._costs if self._options.costs is None else self._options.costs
        if self._options.costs is None:
            with self._shares.of("measuring costs"):
                images, convert_ms = self._first_images()
                costs[setting.name] = measure_setting(setting, model, images, convert_ms).plain()
        if setting.name not in costs:
            given = ", ".join(costs) or "nothing"
            raise MediaError(f"the given costs are for {given}, not for the setting {setting.name}")
        try:
            return CostTable.of(costs[setting.name])
        except ValueError as error:
            raise MediaError(str(error)) from error

    def _first_images(self, number: int = 20) -> tuple[list[np.ndarray], list[float]]:
        """The first images of one size, and the times in ms that it took to decode them."""
        levels, readable = Levels(), (frame for frame in self._open().frames() if not frame.problem)
        frames = [InputFrame.of(index, frame, levels=levels) for index, frame in enumerate(islice(readable, number))]
        found = [(frame.image, frame.convert_ms) for frame in frames if frame.image is not None]
        alike = [(image, ms) for image, ms in found if image.shape == found[0][0].shape][:8]
        return [image for image, _ in alike], [ms for _, ms in alike]

    def _info(self, frames: int, complete: bool, played_s: float | None) -> RunInfo:
        skipped, noted = self.source.skipped, self._problems.items()
        sentences = skipped[:5] + ([f"and {len(skipped) - 5} more like these"] if len(skipped) > 5 else [])
        if self.source.odd_stamps and self._options.stamps != "record":
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
        mode, costs = "realtime" if self._options.realtime else "offline", self._costs or self._options.costs
        return RunInfo(
            mode, read, self._shares.seconds, played_s, self._shares.shares(), costs, sentences, complete=complete,
            threads=torch.get_num_threads(),
        )  # fmt: skip

    def _missing(self) -> list[str]:
        """What is missing in the results of a complete recording."""
        frames = read_frames(self.out / FRAMES)
        frames = frames[frames.setting == self._settings[0].name]
        pairs = int((frames.outcome == PROCESSED).sum())
        if not pairs:
            reasons = (count_words(frames, "reason", FIRST) | count_words(frames, "reason", DROPPED)).items()
            why = "".join(f"; {count} x {reason}" for reason, count in reasons)
            return [f"none of the {len(frames)} frames gave flow, which needs two successive frames{why}"]
        if self._options.truth is None or frames.epe_px.notna().any():
            of_whole = self.frames == self.source.count and self.source.whole
            return unlike_number(self._options.truth, len(frames) + self.source.left_out) if of_whole else []
        expected = "its files must be forward flow between successive frames, from the first frame on"
        return [f"the true flow {self._options.truth} is known for none of the {pairs} pairs: {expected}"]


def measure_setting(
    setting: Setting, model: DEQFlow | None, images: Sequence[np.ndarray], convert_ms: Sequence[float] = ()
) -> CostTable:
    """Measure how long the stages of a setting take on this machine, at every scale that it may use.

    :param images: successive frames, (H, W, 3) uint8 RGB of one size.
    :param convert_ms: measured times of getting such an image out of a message.
    :raises MediaError: if there are fewer than two images.
    """
    if len(images) < 2:
        raise MediaError(f"expected at least two readable frames to measure the costs, got {len(images)}")
    height, width = images[0].shape[:2]
    scales: Sequence[float] = [1.0]
    if model is not None and setting.solves:
        ladder = scale_ladder((height, width), setting.min_scale, setting.max_scale, model.max_pixels)
        scales = ladder if setting.budget_ms else ladder[:1]
    fixed = replace(setting, budget_ms=None, tolerance_px=None, max_iterations=min(4, setting.max_iterations))
    stages: dict[int, dict[str, list[float]]] = {height * width: {"convert": list(convert_ms)}} if convert_ms else {}
    for scale in scales:
        known = stages.setdefault(math.prod(scaled_size(height, width, scale)), {})
        alone = min(scale, LARGEST_SCALE)  # small frames are enlarged beyond it
        estimator = make_estimator(replace(fixed, min_scale=alone, max_scale=alone), model)
        began = time.perf_counter()
        for number in range(COST_ROUNDS + 1):
            if number > 3 and time.perf_counter() - began > LONGEST_S:
                break
            first = number % (len(images) - 1)
            estimator.reset("measuring")
            estimator.update(images[first], 0)
            result = estimator.update(images[first + 1], 1)
            if number == 0 or result is None:
                continue  # the first one paid for allocations and kernel choices
            measured = dict(result.info.stage_ms)
            measured[OVERHEAD] = max(0.0, result.info.latency_ms - sum(measured.values()))
            measured[ITERATION] = measured.pop("solve") / max(1, result.info.iterations)
            for name, value in measured.items():
                known.setdefault(name, []).append(value)
    return CostTable(stages)
