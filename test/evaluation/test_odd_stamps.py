# SPDX-License-Identifier: Apache-2.0
"""Recordings whose stamps are not what a camera at 30 Hz gives: slow, repeated, late, and from clocks that were set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_inputs import FIRST_NS, PERIOD_NS, frames, pictures, table, write_bag, write_folder

from deq_flow_ros.evaluation.report import comparison
from deq_flow_ros.imaging import Frame
from deq_flow_ros.recordings import MediaError, open_source
from deq_flow_ros.streaming.clock import CostTable

SECOND = 10**9
Evaluate = Callable[..., int]
MetricsOf = Callable[[Path], dict[str, Any]]
MODES = ["offline", "--realtime"]


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated robot has time for every frame, however busy this machine is."""
    costs = CostTable({48 * 64: {name: [1.0] for name in ("encode", "coarse", "iteration", "output")}})
    monkeypatch.setattr("deq_flow_ros.evaluation.recording.measure_setting", lambda *_: costs)


def stamped(stamps: list[int], by_the_clock: bool = False) -> list[Frame]:
    """The usual pictures with these stamps, recorded at them; or by the clock, at 30 Hz."""
    stream = zip(frames(pictures(len(stamps))), stamps, strict=True)
    return [replace(one, stamp_ns=t, record_ns=one.record_ns if by_the_clock else t) for one, t in stream]


def run(evaluate: Evaluate, bag: Path, mode: str, *more: object) -> tuple[int, list[dict[str, str]], Path]:
    """Exit status, rows of the table, and where the results are."""
    out = bag.parent / f"out {mode}"
    options = ("--realtime", "--budget-ms", 0) if mode == "--realtime" else ()
    status = evaluate(bag, "--out", out, "--no-bag", *options, *more)
    return status, table(out), out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("period_s", [1, 2])
def test_a_slow_recording_gives_flow_for_every_pair(
    evaluate: Evaluate, tmp_path: Path, mode: str, period_s: int
) -> None:
    """Throttled to 1 Hz, with some ms of jitter, 60 % of the pairs were gaps; with 0.5 Hz, all."""
    stamps = [SECOND * (1 + period_s * i) + 3_000_000 * (i % 2) for i in range(6)]
    status, rows, _ = run(evaluate, write_bag(tmp_path / "bag", stamped(stamps)), mode)
    assert status == 0 and [row["outcome"] for row in rows] == ["first"] + 5 * ["processed"]


def test_the_longest_gap_is_an_option_like_every_parameter_of_the_flow(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was a gap on the robot must be one here, and the other way round; and what is left is said in numbers."""
    bag = write_bag(tmp_path / "bag", stamped([SECOND * (1 + 2 * i) for i in range(4)]))
    status, rows, _ = run(evaluate, bag, "offline", "--param", "max_gap_ms:=1500")
    assert status == 1 and [row["outcome"] for row in rows] == 4 * ["first"]
    assert "none of the 4 frames gave flow" in (said := capsys.readouterr().out)
    assert "3 x gap of 2000 ms, longer than 1500 ms" in said


@pytest.mark.parametrize("mode", MODES)
def test_an_image_that_was_sent_twice_or_late_is_left_out_and_the_stream_goes_on(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path, mode: str
) -> None:
    """Drivers send one twice, or without a stamp; each one ended the stream, and every pair was cold."""
    twice = [FIRST_NS + PERIOD_NS * (i // 2) for i in range(8)]
    late = [*twice, twice[-1] + PERIOD_NS, 0, twice[-1] + 2 * PERIOD_NS]
    bag = write_bag(tmp_path / "bag", stamped(late, by_the_clock=True))
    status, rows, out = run(evaluate, bag, mode)
    left_out = [row for row in rows if row["outcome"] == "dropped" and row["reason"].endswith("left out")]
    assert [row["index"] for row in left_out] == ["1", "3", "5", "7", "9"] and status == 1
    assert [row["outcome"] for row in rows if row not in left_out] == ["first"] + 5 * ["processed"]
    assert [row["warm"] for row in rows if row["outcome"] == "processed"][1:] == 4 * ["1"]
    assert "frames that have a stamp that is not after the one before" in metrics_of(out)["problems"][0]


@pytest.mark.parametrize("mode", MODES)
def test_a_clock_that_was_set_while_recording_costs_one_frame_and_one_pair(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path, mode: str
) -> None:
    """A robot that boots in 1970 and learns the time later; a simulated run took the step for decades without flow."""
    stamps = [5 * SECOND + PERIOD_NS * i for i in range(3)] + [1_700_000_000 * SECOND + PERIOD_NS * i for i in range(4)]
    _, rows, out = run(evaluate, write_bag(tmp_path / "bag", stamped(stamps)), mode)
    assert [row["outcome"][0] for row in rows] == list("fppdfpp"), "the first might be garbage"
    if mode == "--realtime":
        assert metrics_of(out)["run"]["played_seconds"] == pytest.approx(6 * PERIOD_NS / SECOND, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_clock_that_was_set_back_costs_one_frame_and_one_pair(evaluate: Evaluate, tmp_path: Path, mode: str) -> None:
    """The first frame out of order may be a late one, the second tells that it was none."""
    stamps = [100 * SECOND + PERIOD_NS * i for i in range(3)] + [5 * SECOND + PERIOD_NS * i for i in range(4)]
    bag = write_bag(tmp_path / "bag", stamped(stamps, by_the_clock=True))
    _, rows, _ = run(evaluate, bag, mode)
    assert [row["outcome"][0] for row in rows] == list("fppdfpp") and "time went back by" in rows[4]["reason"]


def test_messages_that_are_not_in_the_order_of_time_are_named_with_what_puts_them_in_order(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path
) -> None:
    """Converters write them in any order. Other stamps do not help, and a clock that was set is not to be sorted."""
    stamps = [FIRST_NS + PERIOD_NS * i for i in (0, 1, 3, 2, 4)]
    status, rows, out = run(evaluate, write_bag(tmp_path / "bag", stamped(stamps)), "offline")
    assert status == 1 and [row["outcome"][0] for row in rows] == list("fppdp")
    (problem,) = metrics_of(out)["problems"]
    assert "frames that are earlier than what precedes them in the recording (was the clock set back?" in problem
    assert "`mcap sort` puts messages in the order of time): 1; the first is frame 3" in problem


@pytest.mark.parametrize("kind", ["bag", "folder"])
def test_a_part_of_a_recording_is_chosen_in_seconds(
    evaluate: Evaluate, metrics_of: MetricsOf, tmp_path: Path, kind: str
) -> None:
    """Of an hour, somebody wants the minute in which it went wrong."""
    write = write_bag(tmp_path / "bag", frames(pictures(9))) if kind == "bag" else None
    path = write or write_folder(tmp_path / "folder", pictures(9))
    status, rows, out = run(evaluate, path, "offline", "--start", 0.1, "--stop", 0.2)
    assert status == 0 and [int(row["stamp_ns"]) for row in rows] == [FIRST_NS + i * PERIOD_NS for i in (4, 5, 6)]
    assert metrics_of(out)["input"]["sha256"] == "", "it is that of the whole recording"
    whole = [one.data for one in open_source(path).frames()]
    part = open_source(path, start_s=0.15)
    assert [bool(np.array_equal(a, one.data)) for a, one in zip(whole[5:], part.frames(), strict=True)] == 4 * [True]
    assert part.count == 4 and part.left_out == 5, "true flow is counted from the first frame of all"
    with pytest.raises(MediaError, match=r"no frame lies in the chosen part: .*from 9 s to its end"):
        list(open_source(path, start_s=9).frames())
    with pytest.raises(MediaError, match="expected a part from 0 s or later to a later time, got 2 s to 1 s"):
        open_source(path, start_s=2, stop_s=1)


def test_a_figure_of_zero_is_a_figure(tmp_path: Path) -> None:
    """A dash says that nothing is known; a flow without any outlier is worth saying."""
    settings = [{"name": name, "setting": {"method": method}, "frames": {"processed": 3}} for name, method in (
        ("any", "deq"), ("dis", "dis"),
    )]  # fmt: skip
    means = {"any": {"fl_percent": 0.0, "iterations": 0.0}, "dis": {"fl_percent": 1.5, "iterations": 0.0}}
    rows = {row.title: row for row in comparison({"settings": settings, "comparison": {"means": means}})}
    (outliers,) = (row for title, row in rows.items() if "Fl" in title or "%" in title)
    assert outliers.values == ["0.00", "1.50"] and outliers.best == {0}
    assert rows["iterations, mean"].values == ["0.0", "–"], "a classical method makes none"
