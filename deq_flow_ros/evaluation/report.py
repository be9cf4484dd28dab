# SPDX-License-Identifier: Apache-2.0
"""The pages of results: ``report.html`` of a recording, a single file that loads nothing from elsewhere, and
``index.html`` of several recordings, with ``recordings.json`` for programs.

An overview is made only from the files in the folders of the recordings, so it does not matter which process evaluated
which recording, or when.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from deq_flow_ros.evaluation import summary
from deq_flow_ros.evaluation.gallery import Gallery, panels, run_plots
from deq_flow_ros.evaluation.records import MEASURES
from deq_flow_ros.evaluation.summary import Figure, SettingEntry, number, percent
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.imaging.pictures import data_uri, flow_to_color
from deq_flow_ros.recordings.files import write_json, write_text

REPORT, METRICS, FRAMES, VIDEO, ANIMATION = "report.html", "metrics.json", "frames.csv", "flow.mp4", "flow.webp"
"""Names of the result files of a recording."""
STATE, RUN = ".run", "run.json"
"""Folder beside the results with what is needed only during a run, and the file in it that identifies the run."""
INDEX, ROWS = "index.html", "recordings.json"
"""Names of the files of an overview."""
SHOWN = (
    "epe_visible_px", "epe_px", "epe_still_px", "fl_percent", "photometric", "photometric_still", "consistency_px",
    "flicker_px",
)  # fmt: skip
"""Measures in the overview. One that no recording has is left out."""
Row = Mapping[str, Any]
"""The entry of one recording in ``recordings.json``."""


def has_begun(path: Path) -> bool:
    """Whether a run has begun to write its results to this folder."""
    return (path / STATE / RUN).is_file()


def read_json(path: Path) -> dict[str, Any] | None:
    """What a run has written into a file; None if it is not there, or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template of this package.

    :raises MediaError: if the file cannot be written.
    """
    loader = PackageLoader("deq_flow_ros.evaluation")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"number": number, "percent": percent}
    write_text(path, pages.get_template(template).render(**values))


def write_report(
    path: Path, settings: Sequence[SettingEntry], frames: pd.DataFrame, metrics: summary.Metrics,
    galleries: Mapping[str, Gallery],
) -> None:  # fmt: skip
    """Write the page of a recording.

    :param settings: the settings, the main one first.
    :param frames: from ``read_frames``.
    :param metrics: from ``summarise``.
    :param galleries: by setting.
    :raises MediaError: if it cannot be written.
    """
    main = metrics["settings"][0]
    error = summary.error_measure(main)
    by_setting = {setting.name: frames[frames.setting == setting.name] for setting in settings}
    measured = {name for figures in metrics["settings"] for name in figures["measures"]}
    # The key of the flow colours: each place has the colour of the vector leading to it.
    vectors = np.dstack(np.meshgrid(*2 * [np.linspace(-1, 1, 96, dtype=np.float32)]))
    vectors[np.hypot(*np.moveaxis(vectors, 2, 0)) > 1] = 0
    write_page(
        path, "report.html", metrics=metrics, mode=summary.mode(metrics), settings=settings,
        headline=summary.headline(metrics), comparison=summary.comparison(metrics),
        plots=run_plots(by_setting, main["setting"].get("budget_ms"), error), error=MEASURES[error],
        stages={name: values["mean"] for name, values in main["stage_ms"].items() if values["mean"]},
        measures={name: measure for name, measure in MEASURES.items() if name in measured},
        key=data_uri(flow_to_color(vectors, 1.0)), strips=_strips(settings, galleries),
    )  # fmt: skip


def _strips(settings: Sequence[SettingEntry], galleries: Mapping[str, Gallery]) -> list[dict[str, Any]]:
    """The rows of pictures: best, median and worst pairs of the main setting, and their flow with other settings."""
    main, *others = settings
    gallery, strips = galleries[main.name], []
    for label, index in gallery.ranked():
        preview = gallery.preview(index)
        max_px, shown = panels(preview)
        shown += [
            (f"flow, {other.name}", flow_to_color(galleries[other.name].preview(index).flow, max_px))
            for other in others
            if index in galleries[other.name]
        ]
        pictures = [(caption, data_uri(picture)) for caption, picture in shown]
        strips.append({"label": label, "index": index, "error": preview.rank, "pictures": pictures})
    return strips


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
            return row | {"state": "failed", "problems": [self.failure.read_text().strip()]}
        if (metrics := read_json(self.out / METRICS)) is None:
            return row | {"state": "unfinished" if has_begun(self.out) else "to do"}
        row["state"] = "complete" if metrics["complete"] else "interrupted"
        return row | {key: metrics[key] for key in ("problems", "settings", "comparison")}


def check_place(out: Path) -> None:
    """Refuse a folder with an ``index.html`` that is not an overview.

    :raises MediaError: for such a folder.
    """
    if (out / INDEX).exists() and not (out / ROWS).exists():
        raise MediaError(f"{out / INDEX} is there already and is not an overview of recordings; choose another --out")


def write_overview(out: Path, assignments: Sequence[Assignment]) -> list[Row]:
    """Write the overview from the present content of the folders; returns its rows.

    :raises MediaError: if a file cannot be written.
    """
    while True:
        rows = [assignment.row(out) for assignment in assignments]
        write_json(out / ROWS, rows)
        _write_index(out / INDEX, rows)
        # Another process may have finished in between, and its rows were overwritten here by older ones.
        if rows == [assignment.row(out) for assignment in assignments]:
            return rows


def _write_index(path: Path, rows: Sequence[Row]) -> None:
    problems = [(row, problem) for row in rows for problem in row.get("problems", ())]
    problems += [(row, "interrupted; --resume starts it again") for row in rows if row["state"] == "interrupted"]
    mains = {row["results"]: row["settings"][0] for row in rows if "settings" in row}
    cells = {results: _cells(main) for results, main in mains.items()}
    every = next(iter(cells.values()), {})
    headings = [title for title in every if any(own[title] != number(None) for own in cells.values())]
    names = ("all", "processed", "first", "dropped")
    frames = {name: sum(main["frames"][name] for main in mains.values()) for name in names}
    totals = [Figure(str(len(mains)), "recordings with results", f"of {len(rows)}"), summary.counted(frames)]
    if medians := [ms for main in mains.values() if (ms := main["latency_ms"]["median"]) is not None]:
        totals.append(Figure(f"{min(medians):.1f} – {max(medians):.1f}", "latency, medians", "least and most", "ms"))
    # A table for each figure in which one setting is better than another, separately for each list of settings.
    tables: dict[tuple[tuple[str, ...], str], list[tuple[Row, summary.ComparedRow]]] = {}
    for row in rows:
        compared = tuple(figures["name"] for figures in row.get("settings", ()))
        for one in summary.comparison(row) if len(compared) > 1 else ():
            tables.setdefault((compared, one.title), []).append((row, one))
    comparisons = [
        {"names": compared, "title": title, "rows": table}
        for (compared, title), table in tables.items()
        if any(one.best for _, one in table)
    ]
    write_page(
        path, "overview.html", rows=rows, states=Counter(row["state"] for row in rows), problems=problems,
        totals=totals, headings=headings, cells=cells, comparisons=comparisons, report=REPORT,
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
    for name in SHOWN:
        measure = MEASURES[name]
        mean = number(_mean(main, name), 3 if measure.unit == "px" else 2)
        cells[f"{measure.title} [{measure.unit}]"] = mean
    return cells
