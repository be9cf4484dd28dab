# SPDX-License-Identifier: Apache-2.0
"""Several recordings on one page: what became of each, its headline figures, and where its report lies.

`index.html` for people, `recordings.json` for programs. Both are made from what lies in the folders of the recordings
and nothing else, so that it does not matter which process, on which machine, evaluated which of them, or when.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table

from deq_flow_ros.evaluation.folder import has_begun
from deq_flow_ros.evaluation.headline import Figure, comparison, error_measure, number, percent
from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.page import html_page, items, text, tiles
from deq_flow_ros.evaluation.report import METRICS, REPORT
from deq_flow_ros.evaluation.results import write_text
from deq_flow_ros.media.frame import MediaError

INDEX, ROWS = "index.html", "recordings.json"
"""Names of the results in their folder."""
COMPLETE, INTERRUPTED, UNFINISHED, FAILED, TO_DO = "complete", "interrupted", "unfinished", "failed", "to do"
"""States of a recording; an unfinished one is being evaluated, or its process was killed."""
SHOWN = (
    "epe_visible_px", "epe_px", "epe_still_px", "fl_percent", "photometric", "photometric_still", "consistency_px",
    "flicker_px",
)  # fmt: skip
"""Measures in the table, as far as any recording has them."""


@dataclass(frozen=True)
class Assignment:
    """A recording, and the folder for its results."""

    path: str
    out: Path

    @property
    def _failure(self) -> Path:
        return self.out.with_name(f"{self.out.name}.failed.txt")

    def note_failure(self, why: str) -> None:
        """Say beside the results why there are none, for whoever looks there later."""
        write_text(self._failure, why + "\n")

    def forget_failure(self) -> None:
        """It went well this time."""
        self._failure.unlink(missing_ok=True)

    def row(self, out: Path) -> dict[str, Any]:
        """What became of it, as `recordings.json` has it; `out` is the folder of all results."""
        row: dict[str, Any] = {"input": self.path, "results": self.out.relative_to(out).as_posix(), "state": TO_DO}
        if self._failure.is_file():
            return row | {"state": FAILED, "problems": [self._failure.read_text().strip()]}
        if not (self.out / METRICS).is_file():
            return row | {"state": UNFINISHED if has_begun(self.out) else TO_DO}
        metrics = json.loads((self.out / METRICS).read_text())
        return row | {
            "state": COMPLETE if metrics["complete"] else INTERRUPTED,
            "problems": metrics["problems"],
            "settings": metrics["settings"],
            "comparison": metrics["comparison"],
        }


def is_done(row: Mapping[str, Any]) -> bool:
    """Whether no process works on the recording any more, or still has to."""
    return row["state"] in (COMPLETE, FAILED)


def check_place(out: Path) -> None:
    """Raises `MediaError` where an overview would replace a page of somebody else."""
    if (out / INDEX).exists() and not (out / ROWS).exists():
        raise MediaError(f"{out / INDEX} is there already, and no overview of recordings; choose another --out")


def write_overview(out: Path, assignments: Sequence[Assignment]) -> list[dict[str, Any]]:
    """Write both files from what lies in the folders by now; returns the rows.

    Raises `MediaError` where they cannot be written.
    """
    while True:
        rows = [assignment.row(out) for assignment in assignments]
        write_text(out / ROWS, json.dumps(rows, indent=1) + "\n")
        write_text(out / INDEX, _page(rows))
        # Another process may have ended in between, and been overwritten here with what was before.
        if rows == [assignment.row(out) for assignment in assignments]:
            return rows


def terminal_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The most important figures of the main setting."""
    table = Table("recording", "state", "frames", "latency ms", "error", title="main setting", title_justify="left")
    for row in rows:
        if "settings" not in row:
            table.add_row(row["results"], row["state"], "", "", "")
            continue
        main = row["settings"][0]
        error = error_measure(main)
        mean = main["measures"].get(error, {}).get("mean")
        shown = "–" if mean is None else f"{number(mean)} {MEASURES[error].unit}"
        latency = number(main["latency_ms"]["median"], 1)
        table.add_row(row["results"], row["state"], str(main["frames"]["all"]), latency, shown)
    return table


def _page(rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        f"<header><h1>Optical flow reports</h1><p>{_counted(rows)}</p></header>",
        _problems(rows),
        tiles(_tiles(rows)),
        "<section><h2>Recordings</h2><p>Figures of the main setting; each name leads to the recording's own report, "
        f"which says how they are measured.</p>{_main_table(rows)}</section>",
        _comparisons(rows),
    ]
    return html_page("Optical flow reports", body)


def _counted(rows: Sequence[Mapping[str, Any]]) -> str:
    states = [row["state"] for row in rows]
    counts = [f"{states.count(s)} {s}" for s in (COMPLETE, INTERRUPTED, UNFINISHED, FAILED, TO_DO) if s in states]
    return text(f"{len(rows)} recordings: {', '.join(counts)}.")


def _problems(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [
        f"{_name(row)}: {text(problem)}"
        for row in rows
        for problem in (
            *(["interrupted; --resume goes on with it"] if row["state"] == INTERRUPTED else []),
            *(f"failed: {why}" if row["state"] == FAILED else why for why in row.get("problems", ())),
        )
    ]
    return f"<section class='bad'><b>To be known first</b><ul>{items(found)}</ul></section>" if found else ""


def _tiles(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    mains = [row["settings"][0] for row in rows if "settings" in row]
    frames = {name: sum(main["frames"][name] for main in mains) for name in ("all", "processed", "first", "dropped")}
    counts = f"{frames['processed']} with flow, {frames['first']} first, {frames['dropped']} dropped"
    shown = [Figure(str(len(mains)), "recordings with results", f"of {len(rows)}")]
    shown.append(Figure(str(frames["all"]), "frames", counts))
    medians = [main["latency_ms"]["median"] for main in mains if main["latency_ms"]["median"] is not None]
    if medians:
        shown.append(Figure(f"{min(medians):.1f} – {max(medians):.1f}", "latency, medians", "least and most", "ms"))
    return shown


def _cells(main: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a recording by the heading of their column; a dash where it does not have one."""
    latency, iterations = main["latency_ms"], main["iterations"]
    cells = {
        "frames": str(main["frames"]["all"]),
        "with flow": str(main["frames"]["processed"]),
        "dropped": str(main["frames"]["dropped"]),
        "fields/s": number(main["fields_per_second"], 1),
        "latency, median [ms]": number(latency["median"], 1),
        "95 % [ms]": number(latency["p95"], 1),
        "late": percent(main["deadline_miss_share"]),
        "iterations, median": number(iterations["median"] or None, 0),
    }
    for name in SHOWN:
        measure = MEASURES[name]
        mean = main["measures"].get(name, {}).get("mean")
        cells[f"{measure.title} [{measure.unit}]"] = number(mean, 3 if measure.unit == "px" else 2)
    return cells


def _main_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = {row["results"]: _cells(row["settings"][0]) for row in rows if "settings" in row}
    headings = [
        heading
        for heading in next(iter(cells.values()), {})
        if any(of_one[heading] != number(None) for of_one in cells.values())
    ]
    lines = []
    for row in rows:
        shown = cells.get(row["results"])
        values = (
            f"<td class='reason' colspan='{len(headings)}'>{text('; '.join(row.get('problems', ())))}</td>"
            if shown is None
            else items((text(shown[heading]) for heading in headings), "td")
        )
        lines.append(f"<tr><th>{_name(row)}</th><td class='state'>{text(row['state'])}</td>{values}</tr>")
    return _wide(f"<th></th><th class='state'>state</th>{items(map(text, headings), 'th')}", lines)


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tables of recordings and settings; recordings with other settings than the rest have tables of their own."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        names = tuple(figures["name"] for figures in row.get("settings", ()))
        if len(names) > 1:
            alike.setdefault(names, []).append(row)
    tables = "".join(_compared(names, compared) for names, compared in alike.items())
    if not tables:
        return ""
    return (
        "<section><h2>Settings compared</h2><p>Means over the pairs of a recording for which every setting gave flow; "
        f"the best is bold.</p>{tables}</section>"
    )


def _compared(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each figure in which one of these settings is better than another."""
    lines: dict[str, list[str]] = {}
    tell: set[str] = set()
    for row in rows:
        for title, shown, best in comparison(row):
            cells = (f"<td{' class=best' if n in best else ''}>{text(value)}</td>" for n, value in enumerate(shown))
            lines.setdefault(title, []).append(f"<tr><th>{_name(row)}</th>{''.join(cells)}</tr>")
            tell |= {title} if best else set()
    head = "<th></th>" + items(map(text, names), "th")
    return "".join(f"<h3>{text(title)}</h3>{_wide(head, shown)}" for title, shown in lines.items() if title in tell)


def _wide(head: str, lines: Sequence[str]) -> str:
    return f"<div class='wide'><table class='compared recordings'><tr>{head}</tr>{''.join(lines)}</table></div>"


def _name(row: Mapping[str, Any]) -> str:
    name = text(row["results"])
    return f"<a href='{quote(row['results'])}/{REPORT}'>{name}</a>" if "settings" in row else name
