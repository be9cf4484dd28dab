# SPDX-License-Identifier: Apache-2.0
"""From the records of frames to figures, previews and the report; nothing may be lost, mixed up or fetched."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deq_flow_ros.evaluation import gallery as gallery_module
from deq_flow_ros.evaluation.gallery import Gallery, write_moving_pictures
from deq_flow_ros.evaluation.records import (
    COLUMNS,
    DROPPED,
    FIRST,
    MEASURES,
    PROCESSED,
    FrameRecord,
    FrameTable,
    PairFields,
    measure,
    read_frames,
)
from deq_flow_ros.evaluation.report import SettingEntry, comparison, run_plots, terminal_rows
from deq_flow_ros.evaluation.results import ResultFolder, ResultWriter, RunInfo, count_words, summarise
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.streaming import FlowInfo

ROOT = Path(__file__).parents[2]
STEP_NS = 100_000_000
FIRST_NS = 1_700_000_000_123_456_789
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
    """Of a processed frame; ``more`` is of its ``FlowInfo``."""
    stamps = {"stamp_ns": FIRST_NS + number * STEP_NS, "previous_stamp_ns": FIRST_NS + (number - 1) * STEP_NS}
    values = {"iterations": 4, "warm": number > 1, "residual_px": 0.2, "scale": 1.0, "latency_ms": 30.0}
    values |= {"stop_reason": "converged", "stage_ms": {"encode": 5.0, "solve": 20.0}, "direction": "forward"}
    info = FlowInfo(**{**stamps, **values, "reset_reason": None, "budget_ms": None, **more})
    return FrameRecord(number, info.stamp_ns, PROCESSED, info=info, measures=measures or {})


def with_fields(made: FrameRecord, fields: PairFields) -> FrameRecord:
    return replace(made, measures=measure(fields), fields=fields)


def stream(count: int, slower_ms: float = 0.0) -> list[FrameRecord]:
    """First, a dropped one, the others processed; latency and error grow with the number."""
    records = [FrameRecord(0, FIRST_NS, FIRST, "start"), FrameRecord(1, FIRST_NS + STEP_NS, DROPPED, "superseded")]
    for number in range(2, count):
        budget_ms = 0.0 if slower_ms > 0 and number % 2 == 0 else None  # every second one is late
        latency = number + slower_ms
        records.append(record(number, {"photometric": float(number)}, latency_ms=latency, budget_ms=budget_ms))
    return records


SETTINGS = [
    SettingEntry("fast <b>", {"model": "m", "budget_ms": 5.0}, "a note"),
    SettingEntry("slow, None", {"model": "m", "budget_ms": None}),
]


def written(path: Path, *records: list[FrameRecord]) -> pd.DataFrame:
    """A table of records, a list for each of ``SETTINGS``, as it is read back."""
    table = FrameTable(path / "frames.csv")
    for setting, own in zip(SETTINGS, records, strict=False):
        for item in own:
            table.append(setting.name, item)
    table.close()
    return read_frames(path / "frames.csv")


def test_the_table_holds_what_was_put_in(tmp_path: Path) -> None:
    """All figures come from the table; what is not known must come back as not known, and stamps to the nanosecond."""
    infinite = record(0, residual_px=float("inf"), reset_reason="nan")
    frames = written(tmp_path, stream(5), [infinite])
    main, other = (frames[frames.setting == setting.name] for setting in SETTINGS)
    assert tuple(frames.columns) == COLUMNS and main["index"].tolist() == list(range(5))
    assert main.stamp_ns.tolist() == [FIRST_NS + n * STEP_NS for n in range(5)]
    assert main.previous_stamp_ns.tolist() == [-1, -1, *(FIRST_NS + n * STEP_NS for n in range(1, 4))]
    assert main.latency_ms.tolist()[2:] == [2, 3, 4] and main.latency_ms[:2].isna().all()
    assert main.iterations[:2].isna().all() and main.warm[:2].isna().all(), "of frames without flow"
    assert main.photometric.tolist()[4] == 4 and main.epe_px.isna().all() and main.warm.tolist()[2:] == [1, 1, 1]
    assert other.residual_px.isna().all() and other.reset_reason.tolist() == ["nan"]
    assert count_words(main, "reason", DROPPED) == {"superseded": 1}
    gaps = pd.DataFrame({"outcome": FIRST, "reason": ["gap of 1.5 ms", "start", "gap of -20 ms", ""]})
    assert count_words(gaps, "reason", FIRST) == {"gap of … ms": 2, "start": 1}, "without their numbers"


@pytest.mark.parametrize("odd", [record(0, stage_ms={"nap": 1.0}), record(0, {"beauty": 1.0})])
def test_records_that_no_column_is_for_are_refused(tmp_path: Path, odd: FrameRecord) -> None:
    """Silently left out, they would be missed in the report, later."""
    with pytest.raises(ValueError, match=r"fields not in fieldnames: '(stage_nap_ms|beauty)'"):
        written(tmp_path, [odd])


def test_previews_are_few_evenly_spread_and_hold_the_extremes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of every pair of an hour would fill the disk; but the worst pair must be there, wherever it was."""
    monkeypatch.setattr(gallery_module, "MAX_PREVIEWS", 4)
    errors = [5.0, 5.1, 5.2, 9.0, 5.3, 5.4, 5.5, 5.6, 5.7, 1.0, 5.8, 5.9, 6.0, 6.1, 6.2, 8.0, 6.3, 6.4]
    gallery = Gallery(tmp_path)
    for number, error in enumerate(errors):
        gallery.add(record(number, {"photometric": error}), pair(max(number, 1)))
    assert gallery.spread() == [0, 8, 16]
    assert [index for name, index in gallery.ranked() if name == "worst"][:2] == [3, 15]
    assert ("best", 9) in gallery.ranked() and ("median", 8) in gallery.ranked()
    assert len(list(tmp_path.glob("*.npz"))) == len(gallery) <= 4 + 4
    preview = gallery.preview(8)
    assert preview.rank == 5.7 and preview.image.shape == (40, 64, 3) and preview.truth is not None
    assert preview.flow[0, 0].tolist() == [3.5, 0] and np.array_equal(preview.image, picture(7))
    with pytest.raises(FileNotFoundError):
        gallery.preview(7)


def test_settings_are_compared_on_the_pairs_that_all_have(tmp_path: Path) -> None:
    """A setting that drops the hard frames must not look better for it."""
    frames = written(tmp_path, stream(8), stream(6, slower_ms=10)[:-1])
    metrics = summarise(SETTINGS, frames, RunInfo("offline", {"description": "x"}))
    fast, slow = metrics["comparison"]["means"].values()
    assert metrics["comparison"]["pairs"] == 3, "the frames 2, 3 and 4"
    assert fast["photometric"] == slow["photometric"] == 3
    assert (fast["latency_ms"], slow["latency_ms"]) == (3, 13)
    first, second = metrics["settings"]
    assert first["latency_ms"]["median"] == 4.5 and first["measures"]["photometric"]["pairs"] == 6
    assert first["latency_ms"]["p95"] == pytest.approx(np.percentile(range(2, 8), 95))
    assert first["fields_per_second"] == pytest.approx(1000 / 4.5) and first["warm_share"] == 1
    assert first["deadline_miss_share"] == 0 and second["deadline_miss_share"] is None, "it has no deadline"
    assert first["frames"]["drop_reasons"] == {"superseded": 1}
    rows = {row.title: (row.values, row.best) for row in comparison(metrics)}
    assert rows["latency, mean [ms]"] == (["3.0", "13.0"], {0})
    assert rows["photometric error [grey levels]"] == (["3.00", "3.00"], set()), "alike: none is best"
    assert rows["late"] == (["0.0 %", "–"], set())


def test_a_pair_is_its_two_frames(tmp_path: Path) -> None:
    """The same later frame after another earlier one has another motion: errors of the two are not to be compared."""
    fast = [record(number, {"photometric": float(number)}) for number in (1, 2, 3)]
    slow = [record(1, {"photometric": 5.0}), FrameRecord(2, FIRST_NS + 2 * STEP_NS, DROPPED, "superseded")]
    slow.append(record(3, {"photometric": 9.0}, previous_stamp_ns=FIRST_NS + STEP_NS))
    compared = summarise(SETTINGS, written(tmp_path, fast, slow), RunInfo("realtime", {}))["comparison"]
    assert compared["pairs"] == 1
    assert [figures["photometric"] for figures in compared["means"].values()] == [1.0, 5.0]


def test_a_video_that_the_disk_cut_short_is_none(tmp_path: Path) -> None:
    """OpenCV writes into a full disk without a word, and the file does not play."""
    gallery = Gallery(tmp_path / "previews")
    for number in range(1, 30):
        gallery.add(record(number), pair(number))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MediaError, match="of 29 frames arrived there; is the disk full"):
            write_moving_pictures(tmp_path / "flow.mp4", tmp_path / "flow.webp", gallery)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob("*.webp"))
    write_moving_pictures(tmp_path / "flow.mp4", tmp_path / "flow.webp", gallery)
    assert (tmp_path / "flow.mp4").stat().st_size > 4096


def begun(path: Path) -> ResultFolder:
    with ResultFolder(path, {}) as folder:
        folder.begin()
    return folder


def evaluated(tmp_path: Path, run: RunInfo, count: int = 6) -> dict[str, Any]:
    with ResultWriter(begun(tmp_path), SETTINGS) as writer:
        for number in range(1, count):
            for setting, off_px in zip(SETTINGS, (0.5, 1.0), strict=True):
                writer.add(setting.name, with_fields(record(number), pair(number, off_px)))
    return writer.finish(run)


def test_the_report_is_one_file_with_everything_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to be readable without network and neighbours, and say what it is of, under which settings."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    problems = ["3 frames <i>cannot</i> be read"]
    run = RunInfo("realtime", {"description": "a <b>", "sha256": "abc123"}, 2.0, 4.0, {"reading": 0.01}, None, problems)
    metrics = evaluated(tmp_path, run)
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "a &lt;b&gt;" in page and "fast &lt;b&gt;" in page
    assert "3 frames &lt;i&gt;cannot&lt;/i&gt; be read" in page and "<i>" not in page and "interrupted" not in page
    assert "abc123" in page and "a note" in page and "Baker et al." in page and "of the pixels" in page
    # Fetched would be: whatever is named by src, href, url() or @import and does not stand in the page.
    links = re.findall(r"(?:src|href)=[\"']([^\"']*)|url\(([^)]*)|(@import)", page)
    assert links and all((a or b).startswith("data:") for a, b, _ in links)
    assert "<script" not in page and "default-src 'none'" in page
    assert page.count("data:image/svg+xml") >= 5 and page.count("data:image/jpeg") > 5 * 5
    text = re.sub(r"<[^>]*>", " ", page)
    assert re.search(r"OMP_WAIT_POLICY\s+passive", text) and re.search(r"OMP_NUM_THREADS\s+not set", text)
    assert metrics["run"]["environment"] == {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": None}
    assert metrics["settings"][0]["fields_per_second"] == 5 / 4, "as played"
    assert cv2.VideoCapture(str(tmp_path / "flow.mp4")).read()[0]
    with Image.open(tmp_path / "flow.webp") as animation:
        assert animation.n_frames == 5 and animation.info["loop"] == 0, "every pair, over and over"
    assert ("endpoint error", "0.50 px   (zero flow: 3.00)") in terminal_rows(metrics)


def test_long_runs_are_plotted_in_small_files(tmp_path: Path) -> None:
    """An hour has 100,000 frames: a dot for each would make a page that no browser opens."""
    late = ({} if number % 3 else {"budget_ms": 0.0} for number in range(3000))
    records = [record(number, {"photometric": 1.0 + number % 7}, **more) for number, more in enumerate(late)]
    frames = written(tmp_path, records)
    assert (frames.over_budget == 1).sum() == 1000
    plots = run_plots({"main": frames}, 20.0, "photometric")
    assert {"Latency", "Iterations", "Photometric error"} <= {title for title, _, _ in plots}
    assert all(len(source) < 200_000 for _, _, source in plots)


def test_a_run_that_was_interrupted_or_gave_no_flow_has_a_report_that_says_so(tmp_path: Path) -> None:
    """Figures of a part must not pass for those of the whole; and why every frame was dropped stands there."""
    with ResultWriter(begun(tmp_path), SETTINGS) as writer:
        writer.add(SETTINGS[0].name, FrameRecord(0, 5, DROPPED, "too small"))
    metrics = writer.finish(RunInfo("offline", {"description": "x"}, complete=False))
    page = (tmp_path / "report.html").read_text()
    assert metrics["complete"] is False and "was interrupted" in page and "too small" in page
    assert [figures["latency_ms"]["median"] for figures in metrics["settings"]] == [None], "the other has no frames"
    assert not (tmp_path / "flow.mp4").exists()


FREE = (
    "measures", "stage_ms", "first_reasons", "drop_reasons", "stop_reasons", "resets", "means", "versions",
    "environment", "time_shares",
)  # fmt: skip


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


def test_the_documented_schema_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs read metrics.json by its documentation: a key that is renamed must be noticed here first."""
    monkeypatch.setattr("deq_flow_ros.evaluation.report.run_plots", lambda *_: [])
    evaluated(tmp_path, RunInfo("offline", {"description": "x"}), 3)
    spread = r"\.(mean|median|p95|p99|max)$"
    found = {re.sub(spread, "", key) for key in keys(json.loads((tmp_path / "metrics.json").read_text()))}
    page = (ROOT / "docs" / "evaluate_bag.md").read_text()
    assert sorted(found - set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE))) == []
    for name, m in MEASURES.items():
        assert f"| `{name}` | {m.title} [{m.unit}] | {m.definition} | {m.reference} |" in page, "as in the report"
