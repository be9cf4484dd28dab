# SPDX-License-Identifier: Apache-2.0
"""Faults of a soak run: all kinds come, the camera makes its own, and a recovery that is slow, or none, is seen."""

import itertools
import json
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from soak_faults import (
    BURST,
    CAMERA_KINDS,
    CLOCK_STEP_NS,
    FIRST_S,
    KINDS,
    SCALES,
    Fault,
    Injector,
    disturbances,
    read_logs,
    recoveries,
    schedule,
)

from deq_flow_ros.live.children import Children


def test_every_kind_of_fault_comes_and_none_meets_the_next() -> None:
    """A run that repeats one fault, or makes two at once, does not tell which of them the node bears."""
    faults = schedule(seed=1, seconds=600.0)
    assert faults == schedule(1, 600.0) != schedule(2, 600.0)
    assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)
    assert all(earlier.end_s + 1.0 < later.begin_s for earlier, later in itertools.pairwise(faults))
    assert faults[-1].end_s <= 600.0


def test_the_camera_makes_its_faults_and_says_when_they_are_over() -> None:
    """An image of the wrong size, or a clock that never comes back, would be another test than its name says."""
    faults = [Fault("another size", 1.0, 1.0), Fault("burst", 3.0, 0.0), Fault("clock step", 4.0, 0.0)]
    faults.append(Fault("clock step", 5.0, 0.0))
    seen = dict(disturbances(faults, (number / 2 for number in range(14))))
    assert [at_s for at_s, wrong in seen.items() if wrong.smaller] == [1.0, 1.5]
    assert {at_s: wrong.copies for at_s, wrong in seen.items() if wrong.copies > 1} == {3.0: BURST}
    assert {at_s for at_s, wrong in seen.items() if wrong.clock_offset_ns == CLOCK_STEP_NS} == {4.0, 4.5}
    told = {at_s: wrong.over for at_s, wrong in seen.items() if wrong.over}
    assert told == {2.0: ("another size",), 3.0: ("burst",), 4.0: ("clock step",), 5.0: ("clock step",)}
    later = dict(disturbances(faults, iter([4.8])))[4.8]  # of a camera that was started anew
    assert (later.over, later.copies, later.clock_offset_ns) == ((), 1, CLOCK_STEP_NS)


def test_a_recovery_that_is_slow_or_none_is_seen() -> None:
    """Flow of an image from before the end of the fault is none: it was on its way already."""
    published = {1: 0, 2: 1_000_000_000, 3: 2_000_000_000}
    flow = {1: 1_200_000_000, 2: 1_500_000_000}
    assert recoveries([("burst", 900_000_000)], published, flow) == {"burst": [pytest.approx(0.6)]}
    assert recoveries([("burst", 1_500_000_000)], published, flow) == {"burst": [float("inf")]}


def test_what_a_killed_camera_had_in_hand_is_not_missed(tmp_path: Path) -> None:
    """It writes the line before the image goes out; every other image has to be accounted for."""
    paths = [tmp_path / "0", tmp_path / "1"]
    killed, last = [[1, 10], [2, 20], [3, 30]], [["camera killed", 40], [4, 40], [5, 50]]
    for path, lines in zip(paths, (killed, last), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    images, over = read_logs(paths, reported={1, 2, 4})
    assert images == {1: 10, 2: 20, 4: 40, 5: 50}
    assert over == [("camera killed", 40)]
    assert set(CAMERA_KINDS) < set(KINDS)


def test_every_scale_is_visited_before_the_first_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries keep for each size is then no growth of the run; at the end the budget decides again."""
    kept: list[float | None] = []
    injector = Injector([], Children(Path()), lambda _: None, str, lambda: None, kept.append)
    for second in range(int(FIRST_S) + 1):
        monkeypatch.setattr(time, "monotonic", lambda at_s=float(second): at_s)
        injector.step()
    assert kept == [*SCALES, None]
