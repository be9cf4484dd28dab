# SPDX-License-Identifier: Apache-2.0
"""The pages of results: ``report.html`` of a recording, a single file that loads nothing from elsewhere, and
``index.html`` of several recordings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from deq_flow_ros.evaluation import summary
from deq_flow_ros.evaluation.gallery import Gallery, panels, run_plots
from deq_flow_ros.evaluation.records import MEASURES
from deq_flow_ros.evaluation.summary import SettingEntry, number, percent
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.imaging.pictures import data_uri, flow_to_color
from deq_flow_ros.recordings.files import write_text

REPORT, METRICS, FRAMES, VIDEO, ANIMATION = "report.html", "metrics.json", "frames.csv", "flow.mp4", "flow.webp"
"""Names of the result files of a recording."""
INDEX = "index.html"
"""The page of several recordings."""


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


class Evaluated(NamedTuple):
    """What became of one of several recordings: its folder below that of all results, and its state in words.

    :ivar problem: why there are no results; else empty.
    :ivar metrics: from ``summarise``; None without results.
    """

    name: str
    state: str
    problem: str = ""
    metrics: summary.Metrics | None = None


def write_overview(path: Path, evaluated: Sequence[Evaluated]) -> None:
    """Write the page of several recordings, with the most important figures of each.

    :raises MediaError: if it cannot be written, or is somebody else's page.
    """
    title = "Optical flow reports"
    if path.exists() and f"<title>{title}</title>" not in path.read_text(encoding="utf-8", errors="replace"):
        raise MediaError(f"{path} is there already and is not an overview of recordings; choose another --out")
    cells = {
        one.name: {f"{each.title} [{each.unit}]".removesuffix(" []"): each for each in summary.headline(one.metrics)}
        for one in evaluated
        if one.metrics is not None
    }
    headings = dict.fromkeys(heading for own in cells.values() for heading in own)
    write_page(path, "overview.html", title=title, evaluated=evaluated, cells=cells, headings=headings, report=REPORT)
