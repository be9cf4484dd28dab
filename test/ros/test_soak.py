# SPDX-License-Identifier: Apache-2.0
"""The soak run in short: small images, no bounds on time or memory, exact accounts, and its faults."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
import soak_parts
import soak_report
import torch
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
from soak_flow_node import main, parse_options
from soak_parts import back_and_forth

from deq_flow_ros.host import Children
from deq_flow_ros.model import SIZES, DEQFlow, save_model
from deq_flow_ros.recordings.bags import FrameReport


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights: what is tested here does not depend on how good the flow is."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    save_model(DEQFlow(SIZES["nano"]), path)
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that move to the right."""
    folder = tmp_path_factory.mktemp("frames")
    texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8), (64, 48))
    for number in range(8):
        cv2.imwrite(str(folder / f"{number}.png"), np.roll(texture, number, axis=1))
    return folder


def test_every_image_of_two_cameras_has_exactly_one_account(weights: Path, frames: Path, tmp_path: Path) -> None:
    """The promise of the node, held against what the cameras themselves say that they sent."""
    out = tmp_path / "out.json"
    words = ["--input", str(frames), "--model", str(weights), "--size", "64x48", "--minutes", "0.05"]
    # On a busy machine best effort may lose an image on its way to the node, or a flow field on its way back.
    words += ["--max-iterations", "2", "--cameras", "2", "--reliable", "--accounts-only", "--json", str(out)]
    for parameter in ("warm_up_width:=0", "warm_up_height:=0"):
        words += ["--parameter", parameter]
    assert main(words) == 0
    result = json.loads(out.read_text())
    assert {name: camera["accounts"]["published"] for name, camera in result["cameras"].items()} == {
        "camera_0": 90,
        "camera_1": 60,
    }
    for camera in result["cameras"].values():
        accounts = camera["accounts"]
        assert accounts["processed"] + accounts["first"] + accounts["dropped"] == accounts["published"]
    assert len(result["bounds"]) >= 2 and all(line["holds"] for line in result["bounds"])


def report(stamp_ns: int, **values: str) -> FrameReport:
    """Of a frame that was processed in 20 of 25 ms, of which 14 by the estimator."""
    usual = {
        "outcome": "processed", "direction": "backward", "image2_stamp_ns": str(stamp_ns), "frames_lost": "0",
        "latency_ms": "20", "over_budget": "false", "warm": "true", "iterations": "3", "scale": "1", "age_ms": "2",
        "stage_wait_ms": "5", "stage_convert_ms": "1", "stage_publish_ms": "2",
    }  # fmt: skip
    return FrameReport(stamp_ns, {**usual, **values})


@pytest.fixture
def camera() -> soak_report.Camera:
    """100 images a tenth of a second apart, the flow of each 25 ms later."""
    camera = soak_report.Camera("", (64, 48), 10.0)
    for stamp_ns in range(10**9, 11 * 10**9, 10**8):
        camera.published_ns[stamp_ns] = stamp_ns
        camera.reports.append(report(stamp_ns))
        camera.flow_stamps.append(stamp_ns)
        camera.flow_ns[stamp_ns] = stamp_ns + 25_000_000
    return camera


def judge(camera: soak_report.Camera, memory: list[tuple[int, float]], *words: str) -> dict[str, bool]:
    """Each bound of a run with this camera, and whether it holds."""
    options = parse_options(["--input", "", *words])
    result = {
        "cameras": {"camera": {"accounts": soak_report.accounts(camera), "timing": soak_report.timing(camera, 0.0)}},
        "beside_the_misbehaving": {},
        "memory": soak_report.memory_of(memory, 0.0),
    }
    return {line["bound"]: line["holds"] for line in soak_report.bounds(options, result)}


def test_times_add_up(camera: soak_report.Camera) -> None:
    """A part that is counted twice, or not at all, makes the overhead a matter of taste."""
    times = soak_report.timing(camera, warm_up_s=2.0)
    assert times["fields"] == 80 and times["overhead_ms"]["p50"] == pytest.approx(11.0)
    parts = times["median_by_part_ms"]
    assert parts == pytest.approx(
        {"total": 25, "wait": 5, "convert": 1, "publish": 2, "estimator": 14, "middleware in": 2, "middleware out": 1}
    )
    assert sum(parts.values()) == pytest.approx(2 * parts["total"])


@pytest.mark.parametrize("fault", ["unaccounted", "lost", "twice", "flow missing", "late", "memory", "slow", None])
def test_each_broken_bound_is_found(camera: soak_report.Camera, fault: str | None) -> None:
    """A soak run that cannot fail proves nothing."""
    memory, words, broken = [(second * 10**9, 300.0) for second in range(10)], [], None
    if fault == "unaccounted":
        camera.reports.pop(50)
        camera.flow_stamps.pop(50)
    elif fault == "lost":  # no account of its own, but the node has counted it
        camera.reports.pop(50)
        camera.flow_stamps.pop(50)
        camera.reports[-1].values["frames_lost"] = "1"
        broken = "camera: images lost on the way"
    elif fault == "twice":
        camera.reports.append(camera.reports[50])
    elif fault == "flow missing":
        camera.flow_stamps.pop(50)
    elif fault == "late":
        for number in (10, 20):
            camera.reports[number].values["over_budget"] = "true"
        broken = "camera: share of late fields"
    elif fault == "memory":
        memory[-1] = (9 * 10**9, 307.0)
        broken = "memory, spread after warm-up"
    elif fault == "slow":
        words = ["--overhead"]
        broken = "camera: overhead, median ms"
    if fault in ("unaccounted", "twice", "flow missing"):
        broken = "camera: images that are not accounted for"
    assert [bound for bound, holds in judge(camera, memory, *words).items() if not holds] == [broken] * bool(fault)


@pytest.mark.parametrize("disturbed", [False, True])
def test_a_camera_that_suffers_from_another_one_is_found(disturbed: bool) -> None:
    """Fields per second by what the other camera does: one that is served only while the other is silent must show."""
    seconds = len(soak_parts.PHASES) * soak_parts.PHASE_S
    culprit, victim = (
        soak_report.Camera("bad", (64, 48), 20.0, misbehaves=True),
        soak_report.Camera("good", (64, 48), 30.0),
    )
    culprit.published_ns = {second: second * 10**9 for second in range(int(seconds))}
    flooded = range(10 * int(soak_parts.PHASE_S), 20 * int(soak_parts.PHASE_S))  # the second phase, tenths of a second
    victim.flow_ns = {
        tenth: tenth * 10**8 for tenth in range(10 * int(seconds)) if not (disturbed and tenth in flooded and tenth % 2)
    }
    rates = soak_report.beside_the_misbehaving([victim, culprit])
    assert rates == {
        "good": pytest.approx({**dict.fromkeys(soak_parts.PHASES, 10.0), "flood": 5.0 if disturbed else 10.0}, rel=0.03)
    }
    result = {"cameras": {}, "memory": {}, "beside_the_misbehaving": rates}
    (line,) = soak_report.bounds(parse_options(["--input", "", "--cameras", "2", "--misbehave"]), result)
    assert line["holds"] is not disturbed


def test_a_camera_that_misbehaves_does_all_that_it_is_for() -> None:
    """A flood that is none, or a clock that runs on, would let every run pass."""
    large, small = [bytearray(b"large")] * 2, [bytearray(b"small")] * 2
    shots = list(soak_parts.misbehaving(large, small, 20.0, len(soak_parts.PHASES) * soak_parts.PHASE_S))
    assert [shot.due_s for shot in shots] == sorted(shot.due_s for shot in shots)
    phases = {phase: [] for phase in soak_parts.PHASES}
    for shot in shots:
        phases[soak_parts.PHASES[int(shot.due_s / soak_parts.PHASE_S)]].append(shot)
    counts = {phase: len(found) / soak_parts.PHASE_S for phase, found in phases.items()}
    assert counts == {phase: {"flood": 200.0, "silence": 0.0}.get(phase, 20.0) for phase in soak_parts.PHASES}
    assert {phase for phase, found in phases.items() if found and found[0].message == b"small"} == {"another size"}
    stamps = [shot.due_s + shot.clock_offset_ns * 1e-9 for shot in phases["clock in a loop"]]
    assert sum(later < earlier for earlier, later in itertools.pairwise(stamps)) == 4


def test_the_relay_is_measured_like_the_node() -> None:
    """It is what the overhead is compared with: from an image's going out to its field's coming in, after warm-up."""
    relay = soak_report.Relay()
    for stamp_ns in range(10**9, 11 * 10**9, 10**8):
        relay.published_ns[stamp_ns] = stamp_ns
        relay.flow_ns[stamp_ns] = stamp_ns + (4_000_000 if stamp_ns >= 3 * 10**9 else 90_000_000)
    assert relay.timing(warm_up_s=2.0)["p50"] == relay.timing(warm_up_s=2.0)["max"] == pytest.approx(4.0)


def test_frames_go_back_and_forth_without_a_cut() -> None:
    """A jump from the last frame to the first would reset the stream again and again."""
    order = back_and_forth([bytearray([number]) for number in range(4)])
    assert [next(order)[0] for _ in range(9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]


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
