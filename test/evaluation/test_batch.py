# SPDX-License-Identifier: Apache-2.0
"""The page over several recordings: made of what lies in their folders, whoever evaluated them, and true of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from deq_flow_ros.evaluation import report
from deq_flow_ros.evaluation.records import FrameRecord, FrameTable, read_frames
from deq_flow_ros.evaluation.report import Assignment, check_place, write_overview
from deq_flow_ros.evaluation.summary import RunInfo, SettingEntry, summarise
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.recordings.files import write_json


def finish(assignment: Assignment, latency_ms: float, names: tuple[str, ...] = ("nano", "cold"), **run: object) -> None:
    """The results of three frames under each setting; the one named cold takes 5 ms more."""
    assignment.out.mkdir(parents=True)
    table = FrameTable(assignment.out / "frames.csv")
    for name in names:
        table.append(name, FrameRecord(0, 0, "first", "start"))
        took = latency_ms + (5.0 if name == "cold" else 0.0)
        values = {"iterations": 3, "latency_ms": took, "over_budget": took > 20, "measures": {"photometric": 2.5}}
        for index in (1, 2):
            table.append(name, FrameRecord(index, index, "processed", previous_stamp_ns=index - 1, **values))  # type: ignore[arg-type]
    table.close()
    settings = [SettingEntry(name, {"budget_ms": 20.0}) for name in names]
    info = RunInfo("offline", {"path": "a"}, **run)  # type: ignore[arg-type]
    frames = read_frames(assignment.out / "frames.csv")
    write_json(assignment.out / "metrics.json", summarise(settings, frames, info))


class Page(HTMLParser):
    """The cells of each table row, the links, and what the page would load."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self._cell = False
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True
        if tag == "a":
            self.links.append(values["href"])
        elif tag == "script" or re.search("(?:^|,)(?!data:).", values.get("src", "") or values.get("href", "data:")):
            self.loads.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data.strip()


def test_each_recording_has_its_row_with_figures_a_link_or_the_reason(tmp_path: Path) -> None:
    """Whoever opens the page sees what became of all of them; names are taken as they are, whatever is in them."""
    names = ("day/a", "<b> & c#1", "d", "e", "f")
    everything = [Assignment(f"/bags/{name}", tmp_path / name) for name in names]
    done, odd, broken, begun, _ = everything
    finish(done, 10.0)
    finish(odd, 17.0, problems=["the file x.mcap is damaged"], complete=False)
    broken.failure.write_text("no bag: <nothing>\n")
    (begun.out / ".run").mkdir(parents=True)
    (begun.out / ".run" / "run.json").write_text("{}")
    rows = write_overview(tmp_path, everything)
    assert rows == json.loads((tmp_path / "recordings.json").read_text())
    assert [row["state"] for row in rows] == ["complete", "interrupted", "failed", "unfinished", "to do"]
    assert rows[2]["problems"] == ["no bag: <nothing>"]

    page = Page(tmp_path / "index.html")
    heading, *shown = page.rows[:6]
    assert [row[:2] for row in shown] == [[row["results"], row["state"]] for row in rows]
    figures = dict(zip(heading, shown[0], strict=True))
    assert (figures["frames"], figures["with flow"], figures["latency, median [ms]"]) == ("3", "2", "10.0")
    assert figures["late"] == "0.0 %" and figures["photometric error [grey levels]"] == "2.50"
    assert "endpoint error [px]" not in heading, "no column that nobody has a value for"
    assert [tmp_path / unquote(link) for link in page.links[-2:]] == [tmp_path / n / "report.html" for n in names[:2]]
    assert ["day/a", "10.0", "15.0"] in page.rows, "the settings compared"
    assert page.loads == []
    text = (tmp_path / "index.html").read_text()
    assert "no bag: &lt;nothing&gt;" in text and "x.mcap is damaged" in text and "--resume starts it again" in text

    broken.failure.unlink()
    finish(broken, 30.0)
    assert write_overview(tmp_path, everything)[2]["state"] == "complete"


def test_figures_stand_below_the_names_of_their_own_settings(tmp_path: Path) -> None:
    """Folders may hold runs of other settings, in another order, or more of them; no column must take in another's."""
    settings = {"a": ("nano", "cold"), "b": ("cold", "base"), "c": ("nano", "cold"), "d": ("cold", "nano", "base")}
    everything = [Assignment(name, tmp_path / name) for name in settings]
    for assignment in everything:
        finish(assignment, 10.0, settings[assignment.path])
    write_overview(tmp_path, everything)
    rows = Page(tmp_path / "index.html").rows
    latencies = {"nano": "10.0", "base": "10.0", "cold": "15.0"}
    tables = {("nano", "cold"): "ac", ("cold", "base"): "b", ("cold", "nano", "base"): "d"}
    for names, recordings in tables.items():
        place = rows.index(["", *names])
        expected = [[recording, *(latencies[name] for name in names)] for recording in recordings]
        assert rows[place + 1 : place + 1 + len(recordings)] == expected


def test_the_last_process_to_end_leaves_the_whole_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes share nothing: one that read the folders before another ended must not have the last word with that."""
    mine, other = (Assignment(name, tmp_path / name) for name in "ab")
    finish(mine, 10.0)
    write, ended = report.write_json, []

    def interrupted(path: Path, content: object) -> None:
        if not ended:
            ended.append(path)
            finish(other, 10.0)
        write(path, content)

    monkeypatch.setattr(report, "write_json", interrupted)
    assert [row["state"] for row in write_overview(tmp_path, [mine, other])] == ["complete", "complete"]
    assert "to do" not in (tmp_path / "index.html").read_text() and ended


def test_somebody_elses_page_is_not_replaced(tmp_path: Path) -> None:
    """--out may be a folder that is a web site already."""
    check_place(tmp_path)
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(MediaError, match=r"index\.html is there already"):
        check_place(tmp_path)
