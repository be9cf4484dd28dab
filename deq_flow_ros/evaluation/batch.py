# SPDX-License-Identifier: Apache-2.0
"""An overview of several recordings, ``index.html`` for people and ``recordings.json`` for programs.

Both are made only from the files in the folders of the recordings, so it does not matter which process evaluated which
recording, or when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from deq_flow_ros.evaluation import summary
from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.report import METRICS, REPORT, write_page
from deq_flow_ros.evaluation.results import has_begun, read_json
from deq_flow_ros.evaluation.summary import Figure, number, percent
from deq_flow_ros.imaging.frame import MediaError
from deq_flow_ros.recordings.files import write_json

INDEX, ROWS = "index.html", "recordings.json"
COMPLETE, INTERRUPTED, UNFINISHED, FAILED, TO_DO = "complete", "interrupted", "unfinished", "failed", "to do"
"""States of a recording. An unfinished one is being evaluated, or its process was killed."""
SHOWN = (
    "epe_visible_px", "epe_px", "epe_still_px", "fl_percent", "photometric", "photometric_still", "consistency_px",
    "flicker_px",
)  # fmt: skip
"""Measures in the table. One that no recording has is left out."""
Row = Mapping[str, Any]
"""The entry of one recording in ``recordings.json``."""


@dataclass(frozen=True)
class Assignment:
    """A recording and the folder for its results."""

    path: str
    out: Path

    @property
    def failure(self) -> Path:
        """The file beside the folder with the reason why there are no results, if there are none."""
        return self.out.with_name(f"{self.out.name}.failed.txt")

    def row(self, out: Path) -> Row:
        """The state and the results of the recording; ``out`` is the folder of all results."""
        row: dict[str, Any] = {"input": self.path, "results": self.out.relative_to(out).as_posix()}
        if self.failure.is_file():
            return row | {"state": FAILED, "problems": [self.failure.read_text().strip()]}
        if (metrics := read_json(self.out / METRICS)) is None:
            return row | {"state": UNFINISHED if has_begun(self.out) else TO_DO}
        row["state"] = COMPLETE if metrics["complete"] else INTERRUPTED
        return row | {key: metrics[key] for key in ("problems", "settings", "comparison")}


def check_place(out: Path) -> None:
    """Refuse a folder with an ``index.html`` that is not an overview.

    :raises MediaError: for such a folder.
    """
    if (out / INDEX).exists() and not (out / ROWS).exists():
        raise MediaError(f"{out / INDEX} is there already and is not an overview of recordings; choose another --out")


def write_overview(out: Path, assignments: Sequence[Assignment]) -> list[Row]:
    """Write both files from the present content of the folders.

    :returns: the rows.
    :raises MediaError: if a file cannot be written.
    """
    while True:
        rows = [assignment.row(out) for assignment in assignments]
        write_json(out / ROWS, rows)
        _write_index(out / INDEX, rows)
        # Another process may have finished in between, and its rows were overwritten here by older ones.
        if rows == [assignment.row(out) for assignment in assignments]:
            return rows


def terminal_table(rows: Sequence[Row]) -> Table:
    """A table of the most important figures of the main setting."""
    table = Table("recording", "state", "frames", "latency ms", "error", title="main setting", title_justify="left")
    for row in rows:
        cells = []
        for main in row.get("settings", ())[:1]:
            error = summary.error_measure(main)
            shown = f"{number(_mean(main, error))} {MEASURES[error].unit}"
            cells = [str(main["frames"]["all"]), number(main["latency_ms"]["median"], 1), shown]
        table.add_row(row["results"], row["state"], *cells)
    return table


def _write_index(path: Path, rows: Sequence[Row]) -> None:
    problems = [(row, problem) for row in rows for problem in row.get("problems", ())]
    problems += [(row, "interrupted; --resume starts it again") for row in rows if row["state"] == INTERRUPTED]
    mains = {row["results"]: row["settings"][0] for row in rows if "settings" in row}
    cells = {results: _cells(main) for results, main in mains.items()}
    every = next(iter(cells.values()), {})
    headings = [title for title in every if any(own[title] != number(None) for own in cells.values())]
    names = ("all", "processed", "first", "dropped")
    frames = {name: sum(main["frames"][name] for main in mains.values()) for name in names}
    totals = [
        Figure(str(len(mains)), "recordings with results", f"of {len(rows)}"),
        summary.counted(frames),
    ]
    if medians := [ms for main in mains.values() if (ms := main["latency_ms"]["median"]) is not None]:
        totals.append(Figure(f"{min(medians):.1f} – {max(medians):.1f}", "latency, medians", "least and most", "ms"))
    write_page(
        path, "overview.html", rows=rows, states=Counter(row["state"] for row in rows), problems=problems,
        totals=totals, headings=headings, cells=cells, comparisons=_comparisons(rows), report=REPORT,
    )  # fmt: skip


def _mean(figures: Row, measure: str) -> float | None:
    return figures["measures"].get(measure, {}).get("mean")


def _cells(main: Row) -> dict[str, str]:
    """The figures of a recording by the heading of their column. A missing figure is a dash."""
    cells = {
        "frames": str(main["frames"]["all"]),
        "with flow": str(main["frames"]["processed"]),
        "dropped": str(main["frames"]["dropped"]),
        "fields/s": number(main["fields_per_second"], 1),
        "latency, median [ms]": number(main["latency_ms"]["median"], 1),
        "95 % [ms]": number(main["latency_ms"]["p95"], 1),
        "late": percent(main["deadline_miss_share"]),
        "iterations, median": number(main["iterations"]["median"], 0),
    }
    shown = {name: MEASURES[name].unit for name in SHOWN}
    measures = {name: number(_mean(main, name), 3 if unit == "px" else 2) for name, unit in shown.items()}
    return cells | {f"{MEASURES[name].title} [{unit}]": measures[name] for name, unit in shown.items()}


def _comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A table for each figure in which one setting is better than another, separately for each list of settings."""
    tables: dict[tuple[tuple[str, ...], str], list[tuple[Row, summary.ComparedRow]]] = {}
    for row in rows:
        names = tuple(figures["name"] for figures in row.get("settings", ()))
        for compared in summary.comparison(row) if len(names) > 1 else ():
            tables.setdefault((names, compared.title), []).append((row, compared))
    return [
        {"names": names, "title": title, "rows": compared}
        for (names, title), compared in tables.items()
        if any(row.best for _, row in compared)
    ]
