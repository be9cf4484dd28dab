# SPDX-License-Identifier: Apache-2.0
"""From the records of frames to figures, previews and the report; nothing may be lost, mixed up or fetched."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from deq_flow_ros.evaluation import gallery as gallery_module
from deq_flow_ros.evaluation.gallery import Gallery
from deq_flow_ros.evaluation.headline import comparison, terminal_rows
from deq_flow_ros.evaluation.measures import MEASURES, measure
from deq_flow_ros.evaluation.pictures import write_video
from deq_flow_ros.evaluation.recorded import Recording, evaluate_run, read_run, solve_cold
from deq_flow_ros.evaluation.report import write_outputs
from deq_flow_ros.evaluation.results import DROPPED, FIRST, PROCESSED, FrameRecord, FrameTable, PairFields, Results
from deq_flow_ros.evaluation.summary import RunInfo, summarise
from deq_flow_ros.media import Frame, MediaError, open_source
from deq_flow_ros.media.bags import BagWriter
from deq_flow_ros.media.flow_recording import read_reports
from deq_flow_ros.media.frame import frame_from_array
from deq_flow_ros.model import load_model
from deq_flow_ros.streaming import FlowEstimator

ROOT = Path(__file__).parents[1]
STEP_NS = 100_000_000
SHIFT = 3
"""The pictures of the made-up stream move so many pixels to the right from one to the next."""


def picture(number: int) -> np.ndarray:
    texture = np.random.default_rng(0).integers(0, 256, (40, 160, 3), np.uint8)
    return texture[:, 90 - SHIFT * number : 154 - SHIFT * number]


def pair(number: int, off_px: float = 0.5) -> PairFields:
    """Frames number - 1 and number with flow that is so many px wrong."""
    flow, truth = (np.tile(np.float32([SHIFT + off, 0]), (40, 64, 1)) for off in (off_px, 0))
    residual = np.full((40, 64), 0.2, np.float32)
    return PairFields(picture(number - 1), picture(number), flow, residual, truth)


def record(number: int, measures: dict[str, float] | None = None, **more: Any) -> FrameRecord:
    stamps = {"stamp_ns": number * STEP_NS, "previous_stamp_ns": (number - 1) * STEP_NS}
    values = {"iterations": 4, "warm": number > 1, "residual_px": 0.2, "scale": 1.0, "latency_ms": 30.0}
    values |= {"stop_reason": "converged", "stage_ms": {"encode": 5.0, "solve": 20.0}, "measures": measures or {}}
    return FrameRecord(number, outcome=PROCESSED, **{**stamps, **values, **more})


def stream(count: int, slower_ms: float = 0.0) -> list[FrameRecord]:
    """First, a dropped one, the others processed; latency and error grow with the number."""
    records = [FrameRecord(0, 0, FIRST, "start"), FrameRecord(1, STEP_NS, DROPPED, "superseded by a newer frame")]
    for number in range(2, count):
        late = slower_ms > 0 and number % 2 == 0
        latency = number + slower_ms
        records.append(record(number, {"photometric": float(number)}, latency_ms=latency, over_budget=late))
    return records


def test_a_run_that_was_cut_off_goes_on_with_what_it_has(tmp_path: Path) -> None:
    """Hours of work must survive a killed process, even one killed in the middle of a row."""
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    records = stream(6)
    with FrameTable(whole) as table:
        for item in records:
            table.append("main", item)
    with FrameTable(cut) as table:
        for item in records[:4]:
            table.append("main", item)
    with cut.open("a") as file:
        file.write("main,4,40000")
    with FrameTable(cut) as table:
        assert table.next_index("main") == 4 and table.next_index("other") == 0
        with pytest.raises(ValueError, match="expected a frame from 4 on of main, got 3"):
            table.append("main", records[3])
        for item in records[4:]:
            table.append("main", item)
    assert cut.read_text() == whole.read_text()


def test_the_table_holds_what_was_put_in(tmp_path: Path) -> None:
    """All figures come from the table; what is not known must come back as not known."""
    with FrameTable(tmp_path / "frames.csv") as table:
        results, other = (Results(name, {}, table) for name in ("a,b", "other"))
        for item in stream(5):
            results.add(item)
        other.add(record(0, residual_px=float("nan")))
        series = results.series()
        assert len(series) == 5 and series.index.tolist() == list(range(5))
        assert series.stamp_ns.tolist() == [n * STEP_NS for n in range(5)]
        assert series.number("latency_ms").tolist()[2:] == [2, 3, 4] and np.isnan(series.number("latency_ms")[:2]).all()
        assert series.number("photometric")[4] == 4 and np.isnan(series.number("epe_px")).all()
        assert series.count("reason", DROPPED) == {"superseded by a newer frame": 1}
        assert np.isnan(other.series().number("residual_px")).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"outcome": "lost"}, "outcome out of .* got lost"), ({"stage_ms": {"nap": 1.0}}, "got nap"),
     ({"measures": {"beauty": 1.0}}, "got beauty")],
)  # fmt: skip
def test_records_that_no_column_is_for_are_refused(change: dict[str, Any], message: str) -> None:
    """Silently left out, they would be missed in the report, later."""
    with pytest.raises(ValueError, match=message):
        FrameRecord(**{"index": 0, "stamp_ns": 0, "outcome": PROCESSED, **change})


def test_foreign_tables_and_full_disks_are_named(tmp_path: Path) -> None:
    """Neither may be overwritten, nor cost what was written before."""
    (tmp_path / "frames.csv").write_text("time,money\n1,2\n")
    with pytest.raises(MediaError, match=r"frames.csv is no table of frames .* its columns are time, money"):
        FrameTable(tmp_path / "frames.csv")
    assert (tmp_path / "frames.csv").read_text() == "time,money\n1,2\n"
    with pytest.raises(MediaError, match=r"cannot write /dev/full: .*No space left"):
        FrameTable(Path("/dev/full"))


def test_previews_are_few_evenly_spread_and_hold_the_extremes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of every pair of an hour would fill the disk; but the worst pair must be there, wherever it was."""
    monkeypatch.setattr(gallery_module, "MAX_PREVIEWS", 4)
    errors = [5.0, 5.1, 5.2, 9.0, 5.3, 5.4, 5.5, 5.6, 5.7, 1.0, 5.8, 5.9, 6.0, 6.1, 6.2, 8.0, 6.3, 6.4]
    gallery = Gallery(tmp_path)
    for number, error in enumerate(errors):
        gallery.add(record(number, {"photometric": error}), pair(max(number, 1)))
        if number == 10:
            gallery = Gallery(tmp_path)  # as after an interruption
    assert gallery.indices() == [0, 8, 16] and gallery.step == 8
    assert [index for name, index in gallery.ranked() if name == "worst"][:2] == [3, 15]
    assert ("best", 9) in gallery.ranked() and ("median", 8) in gallery.ranked()
    assert len(list(tmp_path.glob("*.npz"))) == len(gallery) <= 4 + 4
    preview = gallery.preview(8)
    assert preview.rank == 5.7 and preview.image.shape == (40, 64, 3) and preview.truth is not None
    assert preview.flow[0, 0].tolist() == [3.5, 0] and np.array_equal(preview.image, picture(7))
    with pytest.raises(KeyError):
        gallery.preview(7)


def settings_of(tmp_path: Path, table: FrameTable) -> list[Results]:
    fast = Results("fast <b>", {"model": "m", "budget_ms": 5.0}, table, Gallery(tmp_path / "p0"), "a note")
    return [fast, Results("slow", {"model": "m", "budget_ms": None}, table, Gallery(tmp_path / "p1"))]


def test_settings_are_compared_on_the_pairs_that_all_have(tmp_path: Path) -> None:
    """A setting that drops the hard frames must not look better for it."""
    with FrameTable(tmp_path / "frames.csv") as table:
        fast, slow = settings_of(tmp_path, table)
        for item in stream(8):
            fast.add(item)
        for item in stream(6, slower_ms=10)[:-1]:
            slow.add(item)
        metrics = summarise([fast, slow], RunInfo("offline", {"description": "x"}))
    means = metrics["comparison"]["means"]
    assert metrics["comparison"]["pairs"] == 3, "the frames 2, 3 and 4"
    assert means["fast <b>"]["photometric"] == means["slow"]["photometric"] == 3
    assert (means["fast <b>"]["latency_ms"], means["slow"]["latency_ms"]) == (3, 13)
    first, second = metrics["settings"]
    assert first["latency_ms"]["median"] == 4.5 and first["measures"]["photometric"]["pairs"] == 6
    assert first["fields_per_second"] == pytest.approx(1000 / 4.5) and first["warm_share"] == 1
    assert first["deadline_miss_share"] == 0 and second["deadline_miss_share"] is None, "it has no deadline"
    assert first["frames"]["drop_reasons"] == {"superseded by a newer frame": 1}
    rows = {title: (values, best) for title, values, best in comparison(metrics)}
    assert rows["latency, mean [ms]"] == (["3.0", "13.0"], {0})
    assert rows["photometric error [grey levels]"] == (["3.00", "3.00"], set()), "alike: none is best"
    assert rows["late"] == (["0.0 %", "–"], set())


def test_a_pair_is_its_two_frames(tmp_path: Path) -> None:
    """The same later frame after another earlier one has another motion: errors of the two are not to be compared."""
    with FrameTable(tmp_path / "frames.csv") as table:
        fast, slow = settings_of(tmp_path, table)
        for number in (1, 2, 3):
            fast.add(record(number, {"photometric": float(number)}))
        slow.add(record(1, {"photometric": 5.0}))
        slow.add(FrameRecord(2, 2 * STEP_NS, DROPPED, "superseded by a newer frame"))
        slow.add(record(3, {"photometric": 9.0}, previous_stamp_ns=STEP_NS))
        comparison = summarise([fast, slow], RunInfo("realtime", {"description": "x"}))["comparison"]
    assert comparison["pairs"] == 1
    assert [figures["photometric"] for figures in comparison["means"].values()] == [1.0, 5.0]


def test_a_video_that_the_disk_cut_short_is_none(tmp_path: Path) -> None:
    """OpenCV writes into a full disk without a word, and the file does not play."""
    gallery = Gallery(tmp_path / "previews")
    for number in range(1, 30):
        gallery.add(record(number), pair(number))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MediaError, match="of 29 frames arrived there; is the disk full"):
            write_video(tmp_path / "flow.mp4", gallery)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.mp4"))
    write_video(tmp_path / "flow.mp4", gallery)
    assert (tmp_path / "flow.mp4").stat().st_size > 4096


def evaluated(tmp_path: Path, run: RunInfo, count: int = 6) -> dict[str, Any]:
    with FrameTable(tmp_path / "frames.csv") as table:
        results = settings_of(tmp_path, table)
        for number in range(1, count):
            for result, off_px in zip(results, (0.5, 1.0), strict=True):
                fields = pair(number, off_px)
                result.add(record(number, measure(fields)), fields)
        return write_outputs(tmp_path, results, run)


def test_the_report_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    """It has to be readable without network and neighbours, and say what it is of, under which settings."""
    problems = ["3 frames <i>cannot</i> be read"]
    run = RunInfo("realtime", {"description": "a <b>", "sha256": "abc123"}, 2.0, 4.0, {"reading": 0.01}, None, problems)
    metrics = evaluated(tmp_path, run)
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "a &lt;b&gt;" in page and "fast &lt;b&gt;" in page
    assert "3 frames &lt;i&gt;cannot&lt;/i&gt; be read" in page and "<i>" not in page and "<b></b>" not in page
    assert "abc123" in page and "a note" in page and "Baker et al." in page and "of the pixels" in page
    # Fetched would be: whatever is named by src, href, url() or @import and is neither here nor in the page.
    links = re.findall(r"(?:src|href)=[\"']([^\"']*)|url\(([^)]*)|(@import)", page)
    assert links and all((a or b).startswith(("data:", "#", "&quot;#", '"#')) for a, b, _ in links)
    assert "<script" not in page and "default-src 'none'" in page
    identifiers = re.findall(r"\sid=[\"']([^\"']*)", page)
    assert len(identifiers) == len(set(identifiers)), "plots in one page must not share theirs"
    assert not re.search(r"<svg(?:(?!</svg>).)*#0[0-9]0[0-9]0", page, re.DOTALL), "colours follow light and dark"
    assert page.count("<svg") >= 5 and page.count("data:image/jpeg") > 6 * 5
    assert metrics["settings"][0]["fields_per_second"] == 5 / 4, "as played"
    assert cv2.VideoCapture(str(tmp_path / "flow.mp4")).read()[0]
    assert ("endpoint error", "0.50 px   (zero flow: 3.00)") in terminal_rows(metrics)


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    """Figures of a part must not pass for those of the whole."""
    metrics = evaluated(tmp_path, RunInfo("offline", {"description": "x"}, complete=False), 3)
    assert metrics["complete"] is False and "was interrupted" in (tmp_path / "report.html").read_text()


def test_what_timing_depends_on_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies of threads that spin while they wait do not compare with those of threads that sleep."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    metrics = evaluated(tmp_path, RunInfo("offline", {"description": "x"}))
    assert metrics["run"]["environment"] == {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": None}
    page = re.sub(r"<[^>]*>", " ", (tmp_path / "report.html").read_text())
    assert re.search(r"OMP_WAIT_POLICY\s+passive", page) and re.search(r"OMP_NUM_THREADS\s+not set", page)


def test_without_any_flow_there_is_a_report_nevertheless(tmp_path: Path) -> None:
    """It says why: every frame was dropped."""
    with FrameTable(tmp_path / "frames.csv") as table:
        results = settings_of(tmp_path, table)[:1]
        results[0].add(FrameRecord(0, 5, DROPPED, "too small"))
        metrics = write_outputs(tmp_path, results, RunInfo("offline", {"description": "x"}))
    assert metrics["settings"][0]["latency_ms"]["median"] is None
    assert "too small" in (tmp_path / "report.html").read_text() and not (tmp_path / "flow.mp4").exists()


FREE = (
    "measures",
    "stage_ms",
    "first_reasons",
    "drop_reasons",
    "stop_reasons",
    "resets",
    "means",
    "versions",
    "environment",
    "time_shares",
)


def keys(value: Any, path: str = "") -> set[str]:
    """Paths of a JSON document; what stands under free names is called `NAME`."""
    if isinstance(value, list):
        return set().union(*(keys(item, f"{path}[]") for item in value)) if value else set()
    if not isinstance(value, dict):
        return {path}
    free = path.rpartition(".")[2] in FREE or path.endswith(".means.NAME")
    if path in ("input", "settings[].setting"):
        return {path}
    return set().union(*(keys(v, f"{path}.{'NAME' if free else k}".lstrip(".")) for k, v in value.items()), set())


def test_the_documented_schema_is_that_of_the_file(tmp_path: Path) -> None:
    """Programs read metrics.json by its documentation: a key that is renamed must be noticed here first."""
    evaluated(tmp_path, RunInfo("offline", {"description": "x"}))
    spread = r"\.(mean|median|p95|p99|max)$"
    found = {re.sub(spread, "", key) for key in keys(json.loads((tmp_path / "metrics.json").read_text()))}
    documented = set(re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "evaluate_bag.md").read_text(), re.MULTILINE))
    assert sorted(found - documented) == []
    page = (ROOT / "docs" / "evaluate_bag.md").read_text()
    for name, m in MEASURES.items():
        assert f"| `{name}` | {m.title} [{m.unit}] | {m.definition} | {m.reference} |" in page, "as in the report"


def as_message(values: np.ndarray, encoding: str, stamp_ns: int) -> Frame:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    height, width = values.shape[:2]
    return Frame(data, height, width, data.size // height, encoding, False, stamp_ns, stamp_ns, "camera")


@pytest.fixture(scope="module", params=["forward", "backward"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Recording]:
    """Six pictures that move by `SHIFT`, and a recording of their flow, 0.5 px wrong; frame 3 was dropped."""
    direction, root = request.param, tmp_path_factory.mktemp("run")
    with BagWriter(root / "input") as writer:
        for number in range(6):
            stamp = number * STEP_NS
            writer.write_frame("/image", frame_from_array(picture(number)[:, :, ::-1], stamp, stamp, "camera"))
    with BagWriter(root / "output") as writer:
        previous = 0
        for number in (0, 1, 3, 2, 4, 5):  # a drop is reported before the frame in hand
            values = {"outcome": "processed", "direction": direction, "image2_stamp_ns": str(number * STEP_NS)}
            values |= {"iterations": "4", "warm": "true" if number > 1 else "false", "latency_ms": "30", "scale": "1"}
            values |= {"residual_px": "0.2", "over_budget": "false", "stage_solve_ms": "20", "stop_reason": "converged"}
            if number in (0, 3):
                values = {"outcome": "first" if number == 0 else "dropped", "reason": "because", "direction": direction}
                writer.write_diagnostics("/statistics", "flow", values, number * STEP_NS, number)
                continue
            values["image1_stamp_ns"] = str(previous * STEP_NS)
            writer.write_diagnostics("/statistics", "flow", values, number * STEP_NS, number)
            sign = 1 if direction == "forward" else -1
            flow = np.zeros((40, 64, 2), np.float32)
            flow[..., 0] = sign * SHIFT * (number - previous) + 0.5
            here = (previous if direction == "forward" else number) * STEP_NS
            writer.write_frame("/residual", as_message(np.full((40, 64), 0.2, np.float32), "32FC1", here))
            writer.write_frame("/flow", as_message(flow, "32FC2", here))
            previous = number
    return direction, root / "input", Recording(root / "output", "/flow", "/residual")


def exact(here: int, there: int) -> tuple[np.ndarray, np.ndarray]:
    flow = np.zeros((40, 64, 2), np.float32)
    flow[..., 0] = SHIFT * (there - here) / STEP_NS
    return flow, np.ones((40, 64), bool)


def test_a_recorded_run_is_held_against_the_right_pictures(played: tuple[str, Path, Recording]) -> None:
    """Pairs, gaps and directions must be matched with their images: any mix-up changes these figures."""
    direction, source, recording = played
    reports = read_reports(recording.bag, "/statistics")
    done = list(read_run(recording, reports, open_source(source), exact))
    assert [record.outcome for record, _ in done] == [FIRST, PROCESSED, PROCESSED, DROPPED, PROCESSED, PROCESSED]
    found = [(record, fields) for record, fields in done if fields is not None]
    assert [record.index for record, _ in found] == [1, 2, 4, 5]
    for item, fields in found:
        assert np.array_equal(fields.image2, picture(item.index)) and fields.direction == direction
        assert item.measures["epe_px"] == pytest.approx(0.5, abs=1e-5) and item.stage_ms == {"solve": 20}
        assert item.measures["photometric"] < 0.75 * item.measures["photometric_still"]
    still = [item.measures["epe_still_px"] for item, _ in found]
    assert still == pytest.approx([SHIFT, SHIFT, 2 * SHIFT, SHIFT])
    assert [item.warm for item, _ in found] == [False, True, True, True]


def test_some_pairs_of_a_recorded_run_are_solved_cold_and_in_the_other_direction(
    played: tuple[str, Path, Recording], tmp_path: Path
) -> None:
    """The comparison is of the very pairs, at the stream's own scale and iterations; the node gives one direction."""
    direction, source, recording = played
    reports = read_reports(recording.bag, "/statistics")
    done = list(read_run(recording, reports, open_source(source), exact))
    about = RunInfo("live", {"description": "x"}, played_s=0.6)
    settings = {"model": "nano", "device": "cpu", "precision": "float32", "budget_ms": 90.0, "direction": direction}
    metrics = evaluate_run(tmp_path, done, settings, "", 2, about)
    assert metrics is not None and metrics["comparison"]["pairs"] == 2, "every second of the three warm ones"
    streamed, cold = metrics["settings"]
    assert streamed["fields_per_second"] == pytest.approx(4 / 0.6) and streamed["frames"]["dropped"] == 1
    assert cold["iterations"]["max"] == 4 and cold["warm_share"] == 0 and cold["deadline_miss_share"] is None
    assert [figures["measures"]["consistency_px"]["pairs"] for figures in (streamed, cold)] == [2, 2]
    assert streamed["measures"]["consistency_px"] != cold["measures"]["consistency_px"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flow.mp4", "frames.csv", "metrics.json", "report.html"]
    estimator = FlowEstimator(load_model("nano"), tolerance_px=None, direction=direction, max_gap_ms=3.6e6)
    item, fields = done[2]
    assert fields is not None
    again = solve_cold(estimator, item, fields)
    assert again is not None and again[0].index == item.index and again[0].iterations == 4
    assert again[1].truth is fields.truth and not np.array_equal(again[1].flow, fields.flow)


def test_an_input_that_is_not_the_one_played_is_noticed(played: tuple[str, Path, Recording], tmp_path: Path) -> None:
    """Errors against the wrong pictures would look like a bad model. And without any recorded flow there is no run."""
    _, source, recording = played
    reports = read_reports(recording.bag, "/statistics")
    with BagWriter(tmp_path / "other") as writer:
        writer.write_frame("/image", frame_from_array(picture(0), 5, 5, "camera"))
    with pytest.raises(MediaError, match="holds no frames stamped 0 and 100000000 ns"):
        list(read_run(recording, reports, open_source(tmp_path / "other"), None))
    elsewhere = Recording(recording.bag, "/none", "/residual")
    assert all(fields is None for _, fields in read_run(elsewhere, reports, open_source(source), None))
