# SPDX-License-Identifier: Apache-2.0
"""One recording under all settings, in one pass: records, previews, the bag of the main setting, and where it can go on
after an interruption.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from deq_flow_ros.evaluation import provenance
from deq_flow_ros.evaluation.estimators import make_estimator
from deq_flow_ros.evaluation.folder import BAG, THREADS, ResultFolder
from deq_flow_ros.evaluation.gallery import Gallery
from deq_flow_ros.evaluation.output_bag import FlowBag, check_space
from deq_flow_ros.evaluation.problems import Problems
from deq_flow_ros.evaluation.realtime import CostTable, RealtimeLane, VirtualClock, measure_costs
from deq_flow_ros.evaluation.report import FRAMES
from deq_flow_ros.evaluation.results import DROPPED, FIRST, PROCESSED, FrameTable, Results
from deq_flow_ros.evaluation.runner import Backward, Done, Extras, Lane, Shot, part, prefixed
from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.evaluation.summary import RunInfo, Shares
from deq_flow_ros.evaluation.truth import TopicTruth, Truth, folder_truth, scene_truth
from deq_flow_ros.media.frame import MediaError, Source
from deq_flow_ros.media.sources import open_source
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming.clock import Clock

CHECKPOINT_S = 300.0
"""A run that is killed loses no more than this."""

Models = Mapping[tuple[str, str, str], DEQFlow]


@dataclass(frozen=True)
class Plan:
    """How recordings are evaluated; what has to be the same for a run to go on.

    :ivar settings: the first one is the main one, whose flow is recorded.
    :ivar mode: "offline" (every frame) or "realtime" (as on the robot).
    :ivar stamps: "header", or "record": frames are stamped with the time at which they were recorded.
    :ivar consistency_every: of so many pairs one is solved in the other direction as well; 0: none.
    :ivar costs: by setting, of an earlier run; None: they are measured.
    """

    settings: tuple[Setting, ...]
    mode: str = "offline"
    topic: str | None = None
    fps: float | None = None
    stamps: str = "header"
    max_frames: int = 0
    consistency_every: int = 10
    truth_folder: str | None = None
    truth_topic: str | None = None
    storage: str = "mcap"
    bag: bool = True
    images: bool = False
    costs: dict[str, Any] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """As plain values that survive JSON."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Outcome:
    """What a session leaves: `results`, one per setting, not closed yet where they share a table."""

    results: Sequence[Results]
    run: RunInfo


Show = Callable[[int, "int | None", Done], None]
"""Hears of every frame done by the main setting: how many by now, of how many, and what became of it."""


class Session:
    """Evaluates one recording into a folder of its own.

    :param resume: go on with an interrupted run of the same plan and input; one that is complete is left as it is.
    :param overwrite: replace results that are there.
    :raises MediaError: for an unusable input or folder.
    """

    def __init__(self, path: str, out: Path, plan: Plan, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.out, self.plan = path, out, plan
        self.source = open_source(path, plan.topic, plan.fps)
        self.source.close()
        if self.source.live:
            raise MediaError(f"{self.source.description}: a camera cannot be read again; evaluate it with --live")
        for read in filter(None, (path, plan.truth_folder)):
            _check_apart(read, out)
        self.shares = Shares()
        with self.shares.of("reading"):
            try:
                self.sha256 = provenance.input_hash(path)
            except OSError as error:
                raise MediaError(f"cannot read {path}: {error}") from error
        identity = {
            "input": self.sha256 or path,
            "plan": plan.fingerprint(),
            THREADS: torch.get_num_threads(),
            # Of what was learnt of costs, only the version that kept it knows the form.
            "version of deq_flow_ros": provenance.versions().get("deq_flow_ros", ""),
        }
        self._folder = ResultFolder(out, identity, resume, overwrite)
        try:
            self._checkpoint = {} if self.complete else self._folder.load()
            self._problems = Problems(**json.loads(str(self._checkpoint.get("problems", "{}"))))
            self._costs: dict[str, Any] = json.loads(str(self._checkpoint.get("costs", "{}")))
        except MediaError:
            self.close()
            raise
        except (ValueError, TypeError) as error:
            self.close()
            raise self._folder.unusable(error) from error

    @property
    def complete(self) -> bool:
        """Whether the results are there already."""
        return self._folder.complete

    @property
    def frames(self) -> int | None:
        """How many there are to do, where that is known."""
        count, limit = self.source.count, self.plan.max_frames
        return min(count, limit) if count and limit else limit or count

    def run(self, models: Models, show: Show, stopped: Callable[[], bool]) -> Outcome:
        """Evaluate what is left of the recording, until it ends or `stopped`.

        Raises `MediaError` where not a single frame can be read, or the results cannot be written; what there is stays.
        """
        with ExitStack() as stack:
            table = stack.enter_context(FrameTable(self.out / FRAMES))
            results = [
                Results(s.name, s, table, Gallery(self._folder.state / "previews" / str(i)), s.note)
                for i, s in enumerate(self.plan.settings)
            ]
            done = int(self._checkpoint.get("frames", 0))
            lanes: list[Lane] | None = None
            bag = self._open_bag()
            previous: Shot | None = None
            saved_s, ended = monotonic(), True
            for shot in self._shots(done):
                if lanes is None:
                    lanes = self._lanes(models)
                    self._check_disk(shot)
                    if self._costs and not self._checkpoint:
                        self._save(done, lanes, bag)  # killed, it must not go on with costs that are measured anew
                    previous = lanes[0].last_taken
                self._problems.check(previous, shot)
                for i, lane in enumerate(lanes):
                    self._keep(lane.take(shot), results[i], bag if i == 0 else None, show if i == 0 else None)
                previous, done = shot, shot.index + 1
                if stopped():
                    ended = False
                    break
                if monotonic() - saved_s > CHECKPOINT_S:
                    self._save(done, lanes, bag)
                    saved_s = monotonic()
            if lanes is None and done:
                lanes = self._lanes(models)  # interrupted after its last frame: something may be owed of it
            for i, lane in enumerate(lanes or ()):
                if ended:
                    self._keep(lane.finish(), results[i], bag if i == 0 else None, show if i == 0 else None)
            self._save(done, lanes or [], bag)
        info = self._info(done, ended)
        if ended:
            info.problems += self._missing(results[0])
        if lanes and isinstance(lanes[0], RealtimeLane):
            info.played_s = lanes[0].played_s
        return Outcome(results, info)

    def finish(self) -> None:
        """Everything is written: nothing is left to go on with."""
        self._folder.finish()

    def close(self) -> None:
        """Let others at the folder."""
        self._folder.close()

    def _shots(self, start: int) -> Iterator[Shot]:
        """The frames from `start` on as RGB. A recording that breaks off ends here, and is named."""
        frames = enumerate(self.source.frames())
        index = -1
        while not self.plan.max_frames or index + 1 < self.plan.max_frames:
            with self.shares.of("reading"):
                try:
                    index, frame = next(frames)
                except StopIteration:
                    return
                except MediaError as error:
                    if index < 0:
                        raise
                    self._problems.note("are followed by what cannot be read", f"frame {index}: {error}")
                    return
                if index < start:
                    continue
                shot = Shot.of(index, frame, self.plan.stamps, self.source.left_out)
            yield shot

    def _lanes(self, models: Models) -> list[Lane]:
        return [self._lane(i, setting, models) for i, setting in enumerate(self.plan.settings)]

    def _lane(self, number: int, setting: Setting, models: Models) -> Lane:
        model = models.get(setting.network) if setting.solves else None
        every = self.plan.consistency_every
        lane_of: Callable[..., Lane] = Lane
        clock = Clock()
        if self.plan.mode == "realtime":
            table = self._cost_table(setting, model)
            clock = virtual = VirtualClock(table)
            lane_of = partial(RealtimeLane, clock=virtual, period_ns=self.source.nominal_period_ns)
        try:
            estimator = make_estimator(setting, model, clock)
        except ValueError as error:
            raise MediaError(f"the setting {setting.name} is impossible: {error}") from error
        backward = Backward(setting, model, every) if every else None
        lane = lane_of(setting, estimator, Extras(self._truth(), backward, self.shares))
        try:
            lane.restore(part(self._checkpoint, str(number)))
        except (ValueError, KeyError) as error:
            raise self._folder.unusable(error) from error
        return lane

    def _cost_table(self, setting: Setting, model: DEQFlow | None) -> CostTable:
        given = self.plan.costs
        if given is not None and setting.name not in given:
            raise MediaError(f"the given costs are of {', '.join(given) or 'nothing'}, not of {setting.name}")
        if given is None and setting.name not in self._costs:
            with self.shares.of("measuring costs"):
                shots = self._first_shots()
                images = [shot.image for shot in shots if shot.image is not None]
                table = measure_costs(setting, model, images, [shot.convert_ms for shot in shots])
                self._costs[setting.name] = table.plain()
        return CostTable.of(given[setting.name] if given is not None else self._costs[setting.name])

    def _first_shots(self) -> list[Shot]:
        """The first few frames that can be read and have the size of the first of them."""
        skipped = list(self.source.skipped)
        shots = [Shot.of(index, frame) for index, frame in zip(range(20), self.source.frames(), strict=False)]
        self.source.skipped = skipped  # another pass over the same frames
        readable = [shot for shot in shots if shot.image is not None]
        sizes = [shot.image.shape for shot in readable if shot.image is not None]
        return [shot for shot, size in zip(readable, sizes, strict=True) if size == sizes[0]][:8]

    def _truth(self) -> Truth | None:
        if self.plan.truth_folder is not None:
            return folder_truth(Path(self.plan.truth_folder))
        if self.plan.truth_topic is not None:
            return TopicTruth(Path(self.path), self.plan.truth_topic, self._note_unreadable)
        return scene_truth(Path(self.path))

    def _note_unreadable(self, what: str) -> None:
        if what not in self.source.skipped:  # every setting reads the true flow for itself
            self.source.skipped.append(what)

    def _keep(self, dones: Iterator[Done], results: Results, bag: FlowBag | None, show: Show | None) -> None:
        for done in dones:
            with self.shares.of("writing"):
                if done.record.index >= results.next_index:  # else it was kept before the run was killed
                    results.add(done.record, done.fields)
                if bag is not None:
                    self._record(bag, done)
            if show is not None:
                show(done.record.index + 1, self.frames, done)

    def _record(self, bag: FlowBag, done: Done) -> None:
        try:
            bag.add(done)
        except (OSError, sqlite3.Error) as error:
            raise MediaError(
                f"cannot write {bag.path}: {error}; what is there so far is kept, and --resume goes on with it"
            ) from error

    def _open_bag(self) -> FlowBag | None:
        if not self.plan.bag:
            return None
        information = json.loads(str(self._checkpoint.get("bag", "null")))
        return FlowBag(self.out / BAG, self.plan.storage, self.plan.images, information, self.source.calibration)

    def _save(self, frames: int, lanes: Sequence[Lane], bag: FlowBag | None) -> None:
        """Write down where the run can go on."""
        with self.shares.of("writing"):
            if bag is not None:
                bag.close_part()
            arrays: dict[str, np.ndarray] = {}
            for i, lane in enumerate(lanes):
                arrays |= prefixed(str(i), lane.snapshot())
            information = bag.information if bag is not None else None
            plain = {"problems": asdict(self._problems), "bag": information, "costs": self._costs}
            texts = {name: np.array(json.dumps(value)) for name, value in plain.items()}
            self._folder.save({"frames": np.array(frames), **texts, **arrays})

    def _missing(self, main: Results) -> list[str]:
        """What a whole recording should have given, and did not."""
        series = main.series()
        pairs = int(series.outcome(PROCESSED).sum())
        if not pairs:
            reasons = {**series.count("reason", FIRST), **series.count("reason", DROPPED)}
            why = "".join(f"; {count} x {reason}" for reason, count in reasons.items())
            return [f"none of the {len(series)} frames gave flow, which takes two that follow each other{why}"]
        given = self.plan.truth_folder or self.plan.truth_topic
        if given is None or np.isfinite(series.number("epe_px")).any():
            return []
        expected = (
            "its messages have to carry the stamp of the image on whose pixels the flow lives"
            if self.plan.truth_topic
            else "its files are forward flow between successive frames, the first one from the first frame on"
        )
        return [f"the true flow {given} is known for none of the {pairs} pairs: {expected}"]

    def _check_disk(self, first: Shot) -> None:
        if self.plan.bag and first.image is not None and self.frames:
            height, width = first.image.shape[:2]
            left = self.frames - first.index
            check_space(self.out, left, height, width, "leave the bag out with --no-bag", self.plan.images)

    def _info(self, frames: int, complete: bool) -> RunInfo:
        return RunInfo(
            self.plan.mode,
            {
                "description": self.source.description,
                "path": self.path,
                "sha256": self.sha256,
                "frames": frames,
                "topic": getattr(self.source, "topic", None),
            },
            seconds=self.shares.seconds,
            shares=self.shares.shares(),
            costs=self._costs or self.plan.costs,
            threads=torch.get_num_threads(),
            problems=[*_lost(self.source), *self._problems.sentences()],
            complete=complete,
        )


def _check_apart(path: str, out: Path) -> None:
    """Raises `MediaError` where results could replace their input, or become part of it."""
    read, place = Path(path).resolve(), out.resolve()
    if read == place or read in place.parents or place in read.parents:
        raise MediaError(f"what is read, {path}, and the results in {out} lie in each other; choose another --out")


def _lost(source: Source) -> list[str]:
    shown = source.skipped[:5]
    return [*shown, f"and {len(source.skipped) - len(shown)} more like these"] if len(source.skipped) > 5 else shown
