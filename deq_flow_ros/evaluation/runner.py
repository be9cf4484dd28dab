# SPDX-License-Identifier: Apache-2.0
"""One setting on one stream of frames: an account of every frame, in order, and the fields of every pair."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from deq_flow_ros.evaluation.estimators import OPPOSITE, Estimator, make_estimator
from deq_flow_ros.evaluation.measures import measure
from deq_flow_ros.evaluation.results import DROPPED, FIRST, FrameRecord, PairFields
from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.evaluation.summary import Shares
from deq_flow_ros.evaluation.truth import Truth
from deq_flow_ros.media.encodings import EncodingError, to_rgb
from deq_flow_ros.media.frame import Frame
from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.streaming import FlowInfo, FlowResult
from deq_flow_ros.streaming.clock import Clock

SUPERSEDED = "superseded by a newer frame"


@dataclass(frozen=True, eq=False)
class Shot:
    """A frame of the recording on its way through the settings.

    :ivar index: number among the frames that could be read, from 0.
    :ivar place: number in the recording, from 0, those that could not be read included.
    :ivar stamp_ns: that of the stream: of the header, or the time of recording.
    :ivar header_ns: that of the header.
    :ivar image: (H, W, 3) uint8 RGB; None where it cannot be read: then `problem` says why.
    :ivar convert_ms: time that reading the pixels took.
    """

    index: int
    place: int
    stamp_ns: int
    header_ns: int
    record_ns: int
    frame_id: str
    image: np.ndarray | None
    problem: str = ""
    convert_ms: float = 0.0

    @classmethod
    def of(cls, index: int, frame: Frame, stamps: str = "header", left_out: int = 0) -> Shot:
        """A frame with its pixels as RGB, and the stamp of its header or (`stamps` "record") of its recording;
        `left_out` frames before it could not be read.
        """
        start = time.perf_counter()
        image, problem = None, ""
        try:
            image = to_rgb(frame.data, frame.height, frame.width, frame.step, frame.encoding, frame.is_bigendian)
        except EncodingError as error:
            problem = str(error)
        took_ms = 1e3 * (time.perf_counter() - start)
        if image is not None and not image.flags.writeable:
            image = image.copy()  # a view of the file's bytes, which PyTorch warns of
        stamp_ns = frame.record_ns if stamps == "record" else frame.stamp_ns
        stamps_ns = (stamp_ns, frame.stamp_ns, frame.record_ns)
        return cls(index, index + left_out, *stamps_ns, frame.frame_id, image, problem, took_ms)

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays, for a file."""
        names = ("index", "place", "stamp_ns", "header_ns", "record_ns", "frame_id", "problem")
        plain = {name: getattr(self, name) for name in names}
        image = {} if self.image is None else {"image": self.image}
        return {"shot": np.array(json.dumps(plain)), **image}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Shot:
        """From what `arrays` gave."""
        return cls(image=arrays.get("image"), **json.loads(str(arrays["shot"])))


@dataclass(frozen=True, eq=False)
class Done:
    """What became of a frame; with `fields` and `info` where it gave flow."""

    shot: Shot
    record: FrameRecord
    fields: PairFields | None = None
    info: FlowInfo | None = None


class Backward:
    """The flow in the other direction, from a cold start, of the first pair and of one after every so many frames: the
    consistency of the two is measured.

    :ivar next_index: the next pair is the first whose later frame has this index or a higher one.
    """

    def __init__(self, setting: Setting, model: DEQFlow | None, every: int) -> None:
        other = replace(setting, direction=OPPOSITE[setting.direction], budget_ms=None, warm=False)
        self._estimator = make_estimator(other, model, Clock())
        self._every = every
        self.next_index = 0

    def of(self, index: int, image1: np.ndarray, image2: np.ndarray) -> np.ndarray | None:
        """(H, W, 2) px of a pair whose later frame has this index; None where it is not its turn."""
        if not self._every or index < self.next_index:
            return None
        self.next_index = index + self._every
        self._estimator.reset("another pair")
        self._estimator.update(image1, 0)
        result = self._estimator.update(image2, 1)
        return None if result is None else result.flow


@dataclass(frozen=True)
class Extras:
    """What there is beside a setting's own flow.

    :ivar truth: gives the true flow of a pair, where it is known.
    :ivar backward: gives the flow in the other direction; None: consistency is not measured.
    :ivar shares: where the time goes.
    """

    truth: Truth | None = None
    backward: Backward | None = None
    shares: Shares = field(default_factory=Shares)


class Lane:
    """One setting at work. Every frame is processed, whatever time it takes."""

    def __init__(self, setting: Setting, estimator: Estimator, extras: Extras | None = None) -> None:
        self.setting = setting
        self._estimator = estimator
        self._extras = Extras() if extras is None else extras
        self._shares = self._extras.shares
        self._previous: Shot | None = None
        self._last: tuple[int, PairFields] | None = None

    @property
    def last_taken(self) -> Shot | None:
        """The last frame that there is something to say of."""
        return self._previous

    def take(self, shot: Shot) -> Iterator[Done]:
        """Take the next frame; yields what is known by now of it, or of one before."""
        yield self._process(shot, None)

    def finish(self) -> Iterator[Done]:
        """After the last frame: what is still owed."""
        yield from ()

    def _process(self, shot: Shot, arrival_ns: int | None) -> Done:
        if shot.image is None:
            return Done(shot, FrameRecord(shot.index, shot.stamp_ns, DROPPED, shot.problem))
        try:
            with self._shares.of("computing"):
                result = self._estimator.update(shot.image, shot.stamp_ns, arrival_ns)
        except ValueError as error:  # smaller than the least size; the stream goes on as it was
            return Done(shot, FrameRecord(shot.index, shot.stamp_ns, DROPPED, str(error)))
        previous, self._previous = self._previous, shot
        if result is None:
            return Done(shot, FrameRecord(shot.index, shot.stamp_ns, FIRST, self._estimator.reset_reason or ""))
        assert previous is not None
        with self._shares.of("measuring"):
            fields = self._fields(previous, shot, result)
            measures = measure(fields, self._fields_before(result.info.previous_stamp_ns))
        self._last = result.info.stamp_ns, fields
        info = replace(result.info, stage_ms={"convert": shot.convert_ms, **result.info.stage_ms})
        return Done(shot, FrameRecord.of_flow(shot.index, info, measures), fields, info)

    def _fields_before(self, stamp_ns: int) -> PairFields | None:
        return self._last[1] if self._last is not None and self._last[0] == stamp_ns else None

    def _fields(self, previous: Shot, shot: Shot, result: FlowResult) -> PairFields:
        assert previous.image is not None and shot.image is not None
        direction = self.setting.direction
        truth, opposite = self._extras.truth, self._extras.backward
        known = truth(previous, shot, direction) if truth is not None else None
        backward = opposite.of(shot.index, previous.image, shot.image) if opposite is not None else None
        return PairFields(
            previous.image,
            shot.image,
            result.flow,
            result.residual if self.setting.solves else None,
            truth=None if known is None else known[0],
            visible=None if known is None else known[1],
            backward=backward,
            direction=direction,
        )

    def snapshot(self) -> dict[str, np.ndarray]:
        """What is needed to go on with the next frame as if nothing had happened."""
        learnt = {"learnt": np.frombuffer(self._estimator.learnt(), np.uint8)}
        if self._extras.backward is not None:
            learnt["next_backward"] = np.array(self._extras.backward.next_index)
        if self._previous is None:
            return learnt
        stream = {name: value for name, value in self._estimator.snapshot().items() if not name.startswith("start_")}
        arrays = {**learnt, **stream, **prefixed("previous", self._previous.arrays())}
        if self._last is not None:
            last = {"last_flow": self._last[1].flow, "last_image1": self._last[1].image1}
            arrays |= {**last, "last_stamp_ns": np.array(self._last[0], np.int64)}
        return arrays | {"reset_reason": np.array(self._estimator.reset_reason or "")}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from a `snapshot`; nothing happens without one."""
        if "previous/shot" in arrays:
            self._estimator.restore(arrays, str(arrays["reset_reason"]) or None)
            self._previous = Shot.of_arrays(part(arrays, "previous"))
        if "next_backward" in arrays and self._extras.backward is not None:
            self._extras.backward.next_index = int(arrays["next_backward"])
        if "learnt" in arrays:
            self._estimator.learn(arrays["learnt"].tobytes())
        if "last_flow" in arrays:
            fields = PairFields(
                arrays["last_image1"], arrays["image2"], arrays["last_flow"], direction=self.setting.direction
            )
            self._last = int(arrays["last_stamp_ns"]), fields


def prefixed(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under longer names, so that several parts can stand in one file."""
    return {f"{name}/{key}": value for key, value in arrays.items()}


def part(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """What was `prefixed` by this name, under its own names."""
    return {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}


def load_models(settings: Iterable[Setting]) -> dict[tuple[str, str, str], DEQFlow]:
    """Every model that the settings name, once, by (name, device, precision). Raises what `load_model` does."""
    wanted = {setting.network for setting in settings if setting.solves}
    return {network: load_model(*network[:2], precision=network[2]) for network in sorted(wanted)}


@contextmanager
def deterministic() -> Iterator[None]:
    """The same flow bit by bit in every run on one machine; some operations on a GPU get slower."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Without `warn_only` what has no deterministic form would be an error, though the result may still be the same.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run(
    frames: Iterable[Frame],
    setting: Setting,
    make_lane: Callable[..., Lane] = Lane,
    *,
    model: DEQFlow | None = None,
    truth: Truth | None = None,
    consistency_every: int = 10,
) -> Iterator[tuple[FrameRecord, PairFields | None]]:
    """Every frame of a stream under one setting, in order.

    :param make_lane: `Lane`: every frame; `realtime.RealtimeLane` with its costs: as on the robot.
    :param model: that of the setting; loaded where it is needed and not given.
    :param consistency_every: of so many pairs one is solved in the other direction as well; 0: none.
    """
    model = next(iter(load_models([setting]).values()), None) if model is None else model
    backward = Backward(setting, model, consistency_every) if consistency_every else None
    lane = make_lane(setting, make_estimator(setting, model, Clock()), Extras(truth, backward))
    for index, frame in enumerate(frames):
        yield from ((done.record, done.fields) for done in lane.take(Shot.of(index, frame)))
    yield from ((done.record, done.fields) for done in lane.finish())
