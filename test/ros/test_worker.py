# SPDX-License-Identifier: Apache-2.0
"""The worker thread of `flow_node`: newest first, fair among cameras, jobs in between."""

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
import torch
from sensor_msgs.msg import Image

from deq_flow_ros.ros.accounts import SUPERSEDED
from deq_flow_ros.ros.camera import Camera
from deq_flow_ros.ros.messages import ReceivedFrame
from deq_flow_ros.ros.worker import FrameWorker


class Gate:
    """Cameras whose frames, known by their arrival, wait for permission in ``begin``: a test decides what waits when.

    :ivar begun: cameras and numbers of the frames, in the order in which they were begun.
    :ivar dropped: the same of those that were dropped, with the reason.
    """

    def __init__(self, names: str, on_gpu: bool) -> None:
        self.begun: list[tuple[str, int]] = []
        self.dropped: list[tuple[str, int, str]] = []
        self.entered, self.permitted = threading.Semaphore(0), threading.Semaphore(0)
        self.cameras = {name: self.camera(name) for name in names}
        device = torch.device("cuda" if on_gpu else "cpu")
        self.worker = FrameWorker(list(self.cameras.values()), device, 0.0)

    def camera(self, name: str) -> Any:
        def begin(frame: ReceivedFrame, limit_ms: float | None) -> None:
            self.begun.append((name, frame.arrival_ns))
            self.entered.release()
            assert self.permitted.acquire(timeout=10.0)

        def drop(frame: ReceivedFrame, reason: str) -> None:
            self.dropped.append((name, frame.arrival_ns, reason))

        return SimpleNamespace(name=name, begin=begin, drop=drop, last_arrival_ns=0, last_shape=(0, 0))

    def take(self, name: str, number: int) -> None:
        """A frame comes."""
        self.worker.take(self.cameras[name], ReceivedFrame(Image(), number, 0))

    def next(self) -> None:
        """Let the one in hand end and the next begin."""
        self.permitted.release()
        assert self.entered.acquire(timeout=10.0)


def run(names: str, script: Callable[[Gate], None], on_gpu: bool = False) -> Gate:
    """Run a script while a frame of the first camera is in hand; what is begun then is in the gate that is returned."""
    gate = Gate(names, on_gpu)
    gate.take(names[0], 0)
    assert gate.entered.acquire(timeout=10.0)
    script(gate)
    gate.permitted.release(100)
    gate.worker.stop()
    del gate.begun[0]
    return gate


def test_the_newest_frame_of_each_camera_wins_and_the_replaced_one_is_dropped() -> None:
    """What is replaced must be accounted for, and an old image must not be computed when there is a new one."""

    def script(gate: Gate) -> None:
        for name, number in (("b", 1), ("a", 2), ("a", 3), ("a", 4)):
            gate.take(name, number)

    gate = run("ab", script)
    assert gate.begun == [("b", 1), ("a", 4)]
    assert gate.dropped == [("a", 2, SUPERSEDED), ("a", 3, SUPERSEDED)]


def test_a_camera_that_floods_takes_no_turn_of_another() -> None:
    """One camera at 200 Hz must leave every second turn to the other, although it always has an image waiting."""

    def script(gate: Gate) -> None:
        for number in range(1, 9, 2):
            gate.take("f", number)
            gate.take("s", number)
            gate.take("f", number)
            gate.next()
            gate.take("f", number + 1)
            gate.next()

    begun = [name for name, _ in run("fs", script).begun][:8]
    assert begun.count("s") == 4 and all("s" in pair for pair in itertools.pairwise(begun))


def test_frames_that_wait_together_are_one_turn_on_a_gpu() -> None:
    """Two cameras are one batch there, but no one waits for a camera that has nothing."""
    turns: list[list[str]] = []

    def script(gate: Gate) -> None:
        process = gate.worker.process
        gate.worker.process = lambda turn: turns.append([camera.name for camera, _ in turn]) or process(turn)
        gate.take("a", 1)
        gate.take("b", 1)
        gate.next()
        gate.take("b", 2)

    run("ab", script, on_gpu=True)
    assert turns == [["b", "a"], ["b"]]  # the one served longest ago first


def test_jobs_run_between_frames_and_one_that_comes_too_late_never_begins() -> None:
    """A snapshot must see a stream at rest, and its caller must not hang behind a long frame."""
    calls = []

    def script(gate: Gate) -> None:
        call = gate.worker.call
        with pytest.raises(TimeoutError):
            call(lambda: calls.append("too late"), 0.01)
        gate.permitted.release(2)
        assert call(lambda: threading.current_thread().name, 10.0) == "flow_0"
        with pytest.raises(OSError, match="disk full"):
            call(lambda: (_ for _ in ()).throw(OSError("disk full")), 10.0)

    worker = run("a", script).worker
    assert not calls
    with pytest.raises(TimeoutError, match="has ended"):  # a snapshot that is asked for while the node stops
        worker.call(lambda: None, 10.0)


def test_what_still_waits_at_the_end_is_dropped_by_name() -> None:
    """Every image has an account, also those that nobody will look at any more."""

    def script(gate: Gate) -> None:
        gate.take("a", 1)
        gate.take("b", 1)
        gate.worker.drop_waiting("the end")

    gate = run("ab", script)
    assert gate.begun == [] and gate.dropped == [("a", 1, "the end"), ("b", 1, "the end")]


def test_an_error_in_one_frame_does_not_end_the_thread(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing would come out any more, with a node that says it is active; nor is an error without account silent."""
    failed: list[str] = []

    def begin(frame: ReceivedFrame, limit_ms: float | None) -> None:
        raise RuntimeError("nobody expected this")

    camera: Any = SimpleNamespace(name="", begin=begin, last_arrival_ns=0, last_shape=(0, 0))
    camera.fail = lambda frame, error: failed.append(str(error))
    worker = FrameWorker([camera], torch.device("cpu"), 0.0)
    for number in range(2):
        worker.take(camera, ReceivedFrame(Image(), time.monotonic_ns(), number))
        worker.call(lambda: None, 10.0)
    del camera.fail
    worker.take(camera, ReceivedFrame(Image(), time.monotonic_ns(), 2))
    worker.stop()
    assert failed == ["nobody expected this"] * 2 and "RuntimeError: nobody expected this" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("nobody expected this"), ValueError("nor this")], ids=repr)
def test_an_error_after_a_frame_had_its_account_is_not_silent(error: Exception) -> None:
    """A ValueError means an unusable image only where the image is read; elsewhere it is a fault like any other."""
    recovered: list[Exception] = []
    camera: Any = object.__new__(Camera)
    camera.name, camera.last_arrival_ns, camera.last_shape = "", 0, (0, 0)
    camera.recover = recovered.append

    def begin(frame: ReceivedFrame, limit_ms: float | None) -> None:
        frame.accounted = True
        raise error

    camera.begin = begin
    worker = FrameWorker([camera], torch.device("cpu"), 0.0)
    worker.take(camera, ReceivedFrame(Image(), time.monotonic_ns(), 0))
    worker.call(lambda: None, 10.0)
    worker.stop()
    assert recovered == [error]
