# SPDX-License-Identifier: Apache-2.0
"""The traced way of one frame through the files of the node, from its message to its published field.

    python test/walk.py [--figure docs/figures/walk.png]

A warm frame is traced: 2 iterations, on the CPU, one subscriber. A room is a file; a change is a call of a function in
another file than that of the function of ours that calls it.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))

from node_parts import configured_node, deliver
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image

ROOT = Path(__file__).parents[1] / "deq_flow_ros"
MAX_CHANGES, MAX_ROOMS = 70, 20
MAIN_WAY = (
    "ros/camera_input.py",
    "ros/worker.py",
    "ros/camera.py",
    "streaming/batch.py",
    "streaming/stream.py",
    "streaming/eager.py",
    "ros/outputs.py",
    "ros/accounts.py",
)
"""The rooms that a frame goes through; the others are asked for something and answer. The last is entered behind the
published field."""
LANES = ("ros", "imaging", "streaming", "model", "equilibrium")
"""Packages, from the top of the figure to its bottom."""
PARAMETERS = (
    "always_on:=false", "precision:=float32", "max_iterations:=2", "tolerance_px:=0.0", "latency_budget_ms:=10000.0",
)  # fmt: skip
SIZE = (128, 160)
FRAMES = 5
"""The last is traced: the stream is warm, and what is done once is done."""


@dataclass
class Walk:
    """Calls from room to room, in their order; the room before the first is "".

    :ivar changes: until the field is published.
    :ivar after: from then until the node is ready for the next frame.
    """

    changes: list[tuple[str, str, str]] = field(default_factory=list)
    after: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def rooms(self) -> list[str]:
        """In the order in which they are first entered."""
        return list(dict.fromkeys(room for _, room, _ in self.changes))

    @property
    def main_rooms(self) -> list[str]:
        """Those of the main way, in the order in which they are first entered."""
        return [room for room in dict.fromkeys(room for _, room, _ in self.changes + self.after) if room in MAIN_WAY]

    def backward(self) -> list[str]:
        """Calls from a room of the main way to one that lies before it."""
        place = {room: number for number, room in enumerate(MAIN_WAY)}
        calls = [(a, b) for a, b, _ in self.changes + self.after if a in place and b in place]
        return [f"{a} calls {b}" for a, b in calls if place[b] <= place[a]]


class Tracer:
    """Notes the calls between our files while ``walk`` is not None, in every thread that begins after it."""

    def __init__(self) -> None:
        self.walk: Walk | None = None
        self.published = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self.walk is None or event != "call" or (room := _room(frame)) is None:
            return
        caller = frame.f_back
        while caller is not None and _room(caller) is None:
            caller = caller.f_back
        before = "" if caller is None else _room(caller) or ""
        if before != room:
            calls = self.walk.after if self.published else self.walk.changes
            calls.append((before, room, frame.f_code.co_name))


def _room(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None


def trace() -> Walk:
    """The walk of a warm frame."""
    tracer, walk = Tracer(), Walk()
    threading.setprofile(tracer)
    try:
        with configured_node(*PARAMETERS) as node:
            node.trigger_activate()
            user, executor = Node("user"), SingleThreadedExecutor()
            user.create_subscription(Image, "/flow_node/flow", lambda message: None, qos_profile_sensor_data)
            publishers = {publisher.topic_name: publisher for publisher in node.publishers}
            flow, accounts = publishers["/flow_node/flow"], publishers["/flow_node/statistics"]
            while not flow.get_subscription_count():
                time.sleep(0.01)
            accounted = threading.Semaphore(0)
            for publisher, then in ((flow, lambda: setattr(tracer, "published", True)), (accounts, accounted.release)):
                _before_publishing(publisher, then)
            for number in range(FRAMES):
                if number == FRAMES - 1:
                    tracer.walk, tracer.published = walk, False
                sys.setprofile(tracer)
                deliver(node, _image(number))
                sys.setprofile(None)
                assert accounted.acquire(timeout=60.0)
                assert node.worker is not None
                node.worker.call(lambda: None, 60.0)  # behind what is done ahead of the next frame
                if number < FRAMES - 1:
                    tracer.walk = None
            tracer.walk = None
            user.destroy_node()
            executor.shutdown()
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    return walk


def _before_publishing(publisher: Any, then: Any) -> None:
    publish = publisher.publish

    def told(message: Any) -> None:
        then()
        publish(message)

    publisher.publish = told


def _image(number: int) -> Image:
    """A texture that moves by 2 px a frame."""
    height, width = SIZE
    noise = np.random.default_rng(0).integers(0, 255, (height, width + 2 * FRAMES, 3), np.uint8)
    pixels = np.ascontiguousarray(cv2.GaussianBlur(noise, (0, 0), 3)[:, 2 * number : 2 * number + width])
    message = Image(height=height, width=width, step=3 * width, encoding="rgb8", data=pixels.tobytes())
    message.header.stamp.nanosec = (number + 1) * 33_000_000
    return message


def draw(walk: Walk, path: Path) -> None:
    """The rooms in the order in which they are first entered, by package, and who calls whom; as PNG.

    It has the names of the rooms as its text "rooms", by which a test sees that it is true.
    """
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    axes = figure.add_subplot()
    rooms = [*walk.rooms, MAIN_WAY[-1]]
    place = {room: (number, -LANES.index(room.partition("/")[0])) for number, room in enumerate(rooms)}
    calls = [*walk.changes, *((a, b, name) for a, b, name in walk.after if b == MAIN_WAY[-1])]
    for (a, b), count in Counter((a, b) for a, b, _ in calls if a).items():
        main = a in MAIN_WAY and b in MAIN_WAY
        style = {"color": "#1f5fa8", "lw": 2.2} if main else {"color": "0.6", "lw": 0.5 + 0.2 * count}
        bent = {"arrowstyle": "-|>", "shrinkA": 16, "shrinkB": 16, "connectionstyle": "arc3,rad=-0.15"}
        axes.annotate("", place[b], place[a], arrowprops={**bent, **style})
    for number, (room, (x, y)) in enumerate(place.items(), 1):
        main = room in MAIN_WAY
        box = {"boxstyle": "round", "fc": "#d6e6f7" if main else "white", "ec": "#1f5fa8" if main else "0.6"}
        name = room.partition("/")[2].removesuffix(".py").replace("_", "\n")
        axes.text(x, y, f"{number}\n{name}", ha="center", va="center", fontsize=7.5, bbox=box)
    for lane, package in enumerate(LANES):
        axes.text(-1.1, -lane, package, ha="right", va="center", fontsize=9, style="italic")
        axes.axhline(-lane - 0.5, color="0.9", lw=0.8)
    axes.set(xlim=(-2.6, len(rooms) - 0.3), ylim=(-len(LANES) + 0.5, 0.9))
    axes.axis("off")
    figure.savefig(path, dpi=120, metadata={"rooms": " ".join(rooms), "Software": None})


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the walk")
    parser.add_argument("--calls", action="store_true", help="print each call into another file")
    arguments = parser.parse_args()
    walk = trace()
    entered = Counter(room for _, room, _ in walk.changes)
    print(
        f"to the published field: {len(walk.changes)} changes of file in {len(walk.rooms)} files; "
        f"{len(walk.after)} more until the node is ready for the next frame"
    )
    for room in walk.rooms:
        print(f"{entered[room]:4} {room}{'  (main way)' if room in MAIN_WAY else ''}")
    if arguments.calls:
        for calls in (walk.changes, walk.after):
            print(*(f"{a:>30} -> {b} {name}" for a, b, name in calls), "", sep="\n")
    print(*walk.backward(), sep="\n", end="")
    if arguments.figure:
        draw(walk, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
