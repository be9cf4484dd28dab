# SPDX-License-Identifier: Apache-2.0
"""The worker thread of `flow_node`: newest first, fair among sources, jobs in between."""

import itertools
import threading
from collections.abc import Callable

import pytest

from deq_flow_ros.ros.worker import FairWorker


class Gate:
    """A handler that waits for permission before each item, so that a test decides what waits when."""

    def __init__(self) -> None:
        self.begun: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.permitted = threading.Semaphore(0)

    def __call__(self, items: list[str]) -> None:
        self.begun.append(items)
        self.entered.release()
        assert self.permitted.acquire(timeout=10.0)

    def next(self) -> None:
        """Let the one in hand end and the next begin."""
        self.permitted.release()
        assert self.entered.acquire(timeout=10.0)


def run(together: bool, script: Callable[[FairWorker[str], Gate], None]) -> list[list[str]]:
    """Run a script while the worker holds the item "busy" in hand; returns what it began, without that."""
    gate = Gate()
    worker: FairWorker[str] = FairWorker(gate, "test", together)
    worker.submit("first", "busy")
    assert gate.entered.acquire(timeout=10.0)
    script(worker, gate)
    gate.permitted.release(100)
    worker.stop()
    return gate.begun[1:]


def test_the_newest_item_of_each_source_wins_and_the_replaced_one_is_returned() -> None:
    """What is replaced must be accounted for, and an old image must not be computed when there is a new one."""

    def script(worker: FairWorker[str], gate: Gate) -> None:
        assert worker.submit("a", "a1") is None and worker.submit("b", "b1") is None
        assert worker.submit("a", "a2") == "a1" and worker.submit("a", "a3") == "a2"
        gate.next()
        gate.next()

    assert run(False, script) == [["a3"], ["b1"]]


def test_a_source_that_floods_takes_no_turn_of_another() -> None:
    """One camera at 200 Hz must leave every second turn to the other, although it always has an item waiting."""

    def script(worker: FairWorker[str], gate: Gate) -> None:
        for number in range(4):
            worker.submit("flood", f"f{number}")
            worker.submit("slow", f"s{number}")
            worker.submit("flood", f"F{number}")
            gate.next()
            worker.submit("flood", f"again{number}")
            gate.next()

    begun = [items[0] for items in run(False, script)]
    assert len(begun) == 8 and sum(item.startswith("s") for item in begun) == 4
    assert all(a[0] == "s" or b[0] == "s" for a, b in itertools.pairwise(begun))


def test_items_that_wait_together_are_handed_over_together() -> None:
    """On a GPU two cameras are one batch, but no one waits for a camera that has nothing."""

    def script(worker: FairWorker[str], gate: Gate) -> None:
        worker.submit("a", "a1")
        worker.submit("b", "b1")
        gate.next()
        worker.submit("b", "b2")
        gate.next()

    assert run(True, script) == [["a1", "b1"], ["b2"]]


def test_jobs_run_between_items_and_one_that_comes_too_late_never_begins() -> None:
    """A snapshot must see a stream at rest, and its caller must not hang behind a long frame."""
    calls = []

    def script(worker: FairWorker[str], gate: Gate) -> None:
        with pytest.raises(TimeoutError):
            worker.call(lambda: calls.append("too late"), 0.01)
        worker.submit("a", "a1")
        gate.permitted.release(2)
        assert worker.call(lambda: threading.current_thread().name, 10.0) == "test_0"
        with pytest.raises(OSError, match="disk full"):
            worker.call(lambda: (_ for _ in ()).throw(OSError("disk full")), 10.0)

    assert run(False, script) == [["a1"]] and not calls


def test_what_still_waits_at_the_end_is_given_back() -> None:
    """Every image has an account, also those that nobody will look at any more."""

    def script(worker: FairWorker[str], gate: Gate) -> None:
        worker.submit("a", "a1")
        worker.submit("b", "b1")
        assert worker.withdraw() == ["a1", "b1"] and worker.idle

    assert run(False, script) == []


def test_an_error_in_one_item_does_not_end_the_thread(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing would come out any more, with a node that says it is active."""
    done = []

    def handle(items: list[str]) -> None:
        if items == ["bad"]:
            raise RuntimeError("nobody expected this")
        done.extend(items)

    worker: FairWorker[str] = FairWorker(handle, "test")
    for item in ("bad", "good"):
        worker.submit("source", item)
        while not worker.idle:
            worker.call(lambda: None, 10.0)
    worker.stop()
    with pytest.raises(TimeoutError, match="has ended"):  # a snapshot that is asked for while the node stops
        worker.call(lambda: None, 10.0)
    assert done == ["good"] and "RuntimeError: nobody expected this" in capfd.readouterr().err
