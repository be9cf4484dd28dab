# SPDX-License-Identifier: Apache-2.0
"""Faults of a soak run: which and when, by a seed, what is done to the processes, and how soon the node recovers.

Faults of the images (``CAMERA_KINDS``) are made by the camera's process, all others from outside.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deq_flow_ros.host import Children

KINDS: dict[str, tuple[float, float]] = {
    "camera killed": (1.0, 5.0),
    "another size": (2.0, 6.0),
    "burst": (0.0, 0.0),
    "clock step": (0.0, 0.0),
    "busy core": (4.0, 10.0),
    "subscriber stopped": (4.0, 10.0),
    "full disk": (2.0, 4.0),
}
"""What goes wrong, and how long it takes in seconds, at least and at most."""
CAMERA_KINDS = ("another size", "burst", "clock step")
FIRST_S, EVERY_S = 40.0, 20.0
"""When the first fault comes, and the time from one to the next; the longest has to fit in."""
SCALES = tuple(sixteenths / 16 for sixteenths in range(4, 17))
"""The processing scales, each of which the node computes at for a while before the first fault: PyTorch's libraries
keep some MB for every size that they see for the first time, and when a budget needs one cannot be foreseen."""
WARM_UP_S = FIRST_S + EVERY_S * len(KINDS)
"""By then each scale and each kind of fault was there once."""
RECOVERY_S = 1.0
"""The longest time from the end of a fault to the first flow of an image that was taken after it."""
BURST = 30
"""Images that go out at once."""
CLOCK_STEP_NS = 3600 * 10**9
"""How far the camera's clock is set forward, and at the next step back again."""
UNSENT = 2
"""Images, at most, that a camera had in hand when it was killed."""
FULL_BYTES = 1024
"""On a full disk the node's files do not grow beyond this."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    :ivar begin_s: counted from the first image.
    :ivar seconds: how long it lasts.
    """

    kind: str
    begin_s: float
    seconds: float

    @property
    def end_s(self) -> float:
        """When it is over."""
        return self.begin_s + self.seconds


def schedule(seed: int, seconds: float) -> list[Fault]:
    """The faults of a run, in the order of time: each kind once before any comes again."""
    dice = random.Random(seed)
    faults: list[Fault] = []
    kinds: list[str] = []
    while FIRST_S + EVERY_S * (len(faults) + 1) <= seconds:
        if not kinds:
            kinds = dice.sample(list(KINDS), len(KINDS))
        kind = kinds.pop()
        begin_s = FIRST_S + EVERY_S * len(faults) + dice.uniform(0.0, 4.0)
        faults.append(Fault(kind, begin_s, dice.uniform(*KINDS[kind])))
    return faults


@dataclass(frozen=True)
class Disturbance:
    """What is wrong with an image that is due.

    :ivar smaller: whether it has the other size.
    :ivar copies: so many images go out at once.
    :ivar clock_offset_ns: how far the clock of its stamp is off.
    :ivar over: the faults that have ended since the image before.
    """

    smaller: bool
    copies: int
    clock_offset_ns: int
    over: tuple[str, ...]


def disturbances(faults: Sequence[Fault], due_s: Iterator[float]) -> Iterator[tuple[float, Disturbance]]:
    """What the camera's process does to its images.

    :param due_s: when each image is due, counted from the first of the run.
    """
    waiting = sorted((fault for fault in faults if fault.kind in CAMERA_KINDS), key=lambda fault: fault.begin_s)
    steps = 0
    for at_s in due_s:
        smaller, copies, over = False, 1, []
        while waiting and waiting[0].end_s <= at_s:
            fault = waiting.pop(0)
            steps += fault.kind == "clock step"
            if at_s - fault.end_s < 0.5:  # else it was over before a camera that was killed came back
                over.append(fault.kind)
                copies = BURST if fault.kind == "burst" else copies
        if waiting and waiting[0].begin_s <= at_s:
            smaller = waiting[0].kind == "another size"
        yield at_s, Disturbance(smaller, copies, CLOCK_STEP_NS * (steps % 2), tuple(over))


class Injector:
    """Makes the faults that come from outside, when they are due.

    :param faults: of the run.
    :param children: the processes: "flow_node", "listener", and the camera under the name that ``camera`` tells.
    :param start_camera: starts the camera's process anew, told how many seconds of the run are over.
    :param camera: the name of the camera's present process.
    :param snapshot: asks the node for a snapshot.
    :param keep_scale: makes the node compute at one scale, or at any again (None).
    :ivar over: kind and ``time.monotonic_ns`` of the end of each fault.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        children: Children,
        start_camera: Callable[[float], None],
        camera: Callable[[], str],
        snapshot: Callable[[], None],
        keep_scale: Callable[[float | None], None],
    ) -> None:
        self._waiting = [fault for fault in faults if fault.kind not in CAMERA_KINDS]
        self._present: Fault | None = None
        self._children, self._start_camera, self._camera, self._snapshot = children, start_camera, camera, snapshot
        self._keep_scale, self._scales = keep_scale, [*SCALES, None]
        self._begin_s: float | None = None
        self.over: list[tuple[str, int]] = []

    @property
    def camera_away(self) -> bool:
        """Whether there is no camera at present."""
        return self._present is not None and self._present.kind == "camera killed"

    def step(self) -> None:
        """Begin or end what is due; the time counts from the first call."""
        now_s = time.monotonic()
        self._begin_s = now_s if self._begin_s is None else self._begin_s
        at_s = now_s - self._begin_s
        if self._scales and at_s >= FIRST_S * (1 - len(self._scales) / len([*SCALES, None])):
            self._keep_scale(self._scales.pop(0))
        if self._present is not None and at_s >= self._present.end_s:
            self._end(self._present, at_s)
            self._present = None
        elif self._present is None and self._waiting and at_s >= self._waiting[0].begin_s:
            self._present = self._waiting.pop(0)
            self._begin(self._present)

    def _begin(self, fault: Fault) -> None:
        if fault.kind == "camera killed":
            self._kill(self._camera())
        elif fault.kind == "busy core":
            self._children.start("neighbour", "soak_parts", ["neighbour"])
        elif fault.kind == "subscriber stopped":
            os.kill(self._children.processes["listener"].pid, signal.SIGSTOP)
        elif fault.kind == "full disk":
            self._limit_files(FULL_BYTES)
            self._snapshot()

    def _kill(self, name: str) -> None:
        """At once, as a crash would, and forget it: it is no child that failed."""
        process = self._children.processes.pop(name)
        process.kill()
        process.wait()

    def _end(self, fault: Fault, at_s: float) -> None:
        if fault.kind == "camera killed":
            self._start_camera(at_s)  # whose first image says when it is over
            return
        if fault.kind == "busy core":
            self._kill("neighbour")
        elif fault.kind == "subscriber stopped":
            os.kill(self._children.processes["listener"].pid, signal.SIGCONT)
        elif fault.kind == "full disk":
            self._limit_files(resource.RLIM_INFINITY)
        self.over.append((fault.kind, time.monotonic_ns()))

    def _limit_files(self, size: int) -> None:
        """Writing beyond it fails, as on a full disk."""
        node = self._children.processes["flow_node"].pid
        _, hard = resource.prlimit(node, resource.RLIMIT_FSIZE)
        resource.prlimit(node, resource.RLIMIT_FSIZE, (hard if size == resource.RLIM_INFINITY else size, hard))


def read_logs(paths: Sequence[Path], reported: Container[int] = ()) -> tuple[dict[int, int], list[tuple[str, int]]]:
    """What a camera published on one topic, and the faults that it made.

    :param paths: of its processes, each but the last of which was killed. What these were about to publish is left out
        if nothing was heard of it.
    :param reported: the stamps that something was heard of.
    :returns: when each image went out (``time.monotonic_ns``), by stamp in ns; kind and end of each fault.
    """
    images: dict[int, int] = {}
    over: list[tuple[str, int]] = []
    for path in paths:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for _ in range(UNSENT if path != paths[-1] else 0):
            if lines and lines[-1][0] not in reported:
                lines.pop()
        images |= {first: now_ns for first, now_ns in lines if isinstance(first, int)}
        over += [(first, now_ns) for first, now_ns in lines if isinstance(first, str)]
    return images, over


def recoveries(
    over: Sequence[tuple[str, int]], published_ns: Mapping[int, int], flow_ns: Mapping[int, int]
) -> dict[str, list[float]]:
    """Seconds from the end of each fault to the first flow of an image that went out after it, by kind.

    :param over: kind and time of the end of each fault.
    :param published_ns: when each image went out, by stamp.
    :param flow_ns: when each flow field came, by stamp.
    :returns: infinite where no such flow came.
    """
    pairs = sorted((published_ns[stamp], came_ns) for stamp, came_ns in flow_ns.items() if stamp in published_ns)
    found: dict[str, list[float]] = {}
    for kind, end_ns in over:
        came = min((came_ns for out_ns, came_ns in pairs if out_ns >= end_ns), default=None)
        found.setdefault(kind, []).append(float("inf") if came is None else (came - end_ns) * 1e-9)
    return found
