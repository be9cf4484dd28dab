# SPDX-License-Identifier: Apache-2.0
"""The pages of results: ``report.html`` of a recording, a single file that loads nothing from elsewhere, and
``index.html`` of several recordings.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from deq_flow_ros.evaluation.gallery import RANKED_BY, Gallery, panels, run_plots
from deq_flow_ros.evaluation.records import FIRST, MEASURES, PROCESSED, SOURCE
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.imaging.pictures import data_uri, flow_to_color
from deq_flow_ros.recordings.files import write_text
from deq_flow_ros.streaming.interface import REPEATED_SHARE

REPORT, METRICS, FRAMES, VIDEO, ANIMATION = "report.html", "metrics.json", "frames.csv", "flow.mp4", "flow.webp"
"""Names of the result files of a recording."""
INDEX = "index.html"
"""The page of several recordings."""
COMPARISON = (
    ("latency_ms", "latency, mean", "ms", 1),
    ("iterations", "iterations, mean", "", 1),
    ("residual_px", "residual, mean", "px", 3),
    *((name, measure.title, measure.unit, 3 if measure.unit == "px" else 2) for name, measure in MEASURES.items()),
)
"""(column, title, unit, digits) of each row in the table that compares settings."""
Metrics = Mapping[str, Any]
"""The result of ``summarise``."""
MODES = {
    "offline": "every frame, one after the other",
    "realtime": "timing as on a robot, simulated from measured costs",
    "live": "through the node over DDS",
}
BY_THE_CLOCK = "budgets are kept by the clock of this machine, so another run gives other figures"
NEITHER_GOOD_NOR_BAD = ("iterations", "residual_px", "photometric_still", "epe_still_px", "static_percent")
"""Figures for which less is not better. A solver that stops early has few iterations and a large residual."""


class SettingEntry(NamedTuple):
    """A setting in the results: its name, its values for ``metrics.json``, and a description for people."""

    name: str
    values: Mapping[str, Any]
    note: str = ""


class Figure(NamedTuple):
    """A figure with its title, its unit, and a note to compare it with."""

    value: str
    title: str
    note: str = ""
    unit: str = ""


class ComparedRow(NamedTuple):
    """A figure for every setting, and the numbers of the settings that are best in it."""

    title: str
    values: list[str]
    best: Collection[int] = frozenset()


def number(value: float | None, digits: int = 2) -> str:
    """A figure with so many digits after the point; a dash if it is not known."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share 0..1 in percent."""
    return "–" if share is None else f"{100 * share:.1f} %"


def counted(frames: Metrics) -> Figure:
    """The numbers of frames by outcome."""
    counts = f"{frames['processed']} with flow, {frames['first']} first, {frames['dropped']} dropped"
    return Figure(str(frames["all"]), "frames", counts)


def error_measure(figures: Metrics) -> str:
    """The measure that says most about the quality of this setting's flow."""
    return next((key for key in RANKED_BY if key in figures["measures"]), "photometric")


def mode_of(metrics: Metrics) -> str:
    """The mode of the run in words, and if it cannot be repeated, why."""
    limited = any(figures["setting"].get("budget_ms") for figures in metrics["settings"])
    return MODES[metrics["mode"]] + (f"; {BY_THE_CLOCK}" if metrics["mode"] == "offline" and limited else "")


def doubtful(frames: pd.DataFrame) -> Iterator[str]:
    """Say how many flow fields of a setting mean nothing, because of their images, or are none.

    :param frames: from ``read_frames``.
    """
    done = frames[frames.outcome == PROCESSED]
    unmatched, repeated = done[done.matched == 0], done[done.repeated == 1]
    for name in (*SOURCE, "size"):
        other = frames[(frames.outcome == FIRST) & frames.reason.str.startswith(f"{name} changed")]
        if len(other):
            what = f"frames that have another {name} than the one before (two cameras on one topic?): {len(other)}"
            yield f"{what}; the first is frame {other.iloc[0]['index']}: {other.iloc[0].reason}"
    if len(unmatched):
        what = f"pairs whose flow means nothing, because their images have nothing in common: {len(unmatched)}"
        yield f"{what} of {len(done)}; the first is frame {unmatched.iloc[0]['index']}"
    if len(repeated) > max(2, REPEATED_SHARE * len(done)):
        what = f"frames that are exactly those before them, so that their flow is zero: {len(repeated)} of {len(done)}"
        why = "is the camera frozen, or does its driver send each image more than once?"
        yield f"{what}; the first is frame {repeated.iloc[0]['index']}; {why}"


def headline(metrics: Metrics) -> list[Figure]:
    """The figures of the main setting."""
    figures = metrics["settings"][0]
    latency, iterations, residual = figures["latency_ms"], figures["iterations"], figures["residual_px"]
    played = "while the stream was played" if metrics["run"]["played_seconds"] else "from the mean latency"
    tail = f"95 %: {number(latency['p95'], 1)}, 99 %: {number(latency['p99'], 1)}, max: {number(latency['max'], 1)}"
    shown = [
        counted(figures["frames"]),
        Figure(number(figures["fields_per_second"], 1), "flow fields per second", played),
        Figure(number(latency["median"], 1), "latency, median", tail, "ms"),
    ]
    if budget := figures["setting"].get("budget_ms"):
        shown.append(Figure(percent(figures["deadline_miss_share"]), "late", f"budget {budget:g} ms"))
    shown += _quality(figures["measures"], error_measure(figures))
    if iterations["max"]:
        warm = f"warm starts {percent(figures['warm_share'])}, scale {number(figures['scale']['mean'])}"
        tail = f"95 %: {number(residual['p95'], 3)}, max: {number(residual['max'], 3)}"
        shown.append(Figure(number(iterations["median"], 0), "iterations, median", warm))
        shown.append(Figure(number(residual["median"], 3), "residual, median", tail, "px"))
    return shown


def _quality(measures: Metrics, error: str) -> list[Figure]:
    mean = {name: values["mean"] for name, values in measures.items()}
    notes = {"fl_percent": "off by more than 3 px and 5 %"}
    if "photometric_still" in mean:
        notes["photometric"] = f"without warping: {number(mean['photometric_still'])}"
    if "epe_still_px" in mean:
        notes["epe_visible_px"] = notes["epe_px"] = f"zero flow: {number(mean['epe_still_px'])}"
    if "consistency_px" in mean:
        pairs, share = measures["consistency_px"]["pairs"], number(mean["inconsistent_percent"], 1)
        notes["consistency_px"] = f"{share} % of the pixels inconsistent; {pairs} pair{'s' * (pairs > 1)}"
    if "static_percent" in mean:
        notes["flicker_px"] = f"on the {number(mean['static_percent'], 1)} % of the pixels that stand still"
    shown = [name for name in dict.fromkeys((error, "fl_percent", "consistency_px", "flicker_px")) if name in mean]
    values = {name: number(mean[name], 3 if mean[name] < 0.1 else 2) for name in shown}
    return [Figure(values[one], MEASURES[one].title, notes.get(one, ""), MEASURES[one].unit) for one in shown]


def compare(by_setting: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Means over the pairs of the same two frames that all settings processed, by column where all know the value.

    :param by_setting: from ``read_frames``, the rows of each setting.
    """
    two = ["index", "previous_stamp_ns"]
    pairs = {name: frames[frames.outcome == PROCESSED].set_index(two) for name, frames in by_setting.items()}
    common = reduce(pd.Index.intersection, (frames.index for frames in pairs.values())).sort_values()
    means: dict[str, dict[str, float]] = {name: {} for name in pairs}
    for column, *_ in COMPARISON:
        values = pd.DataFrame({name: frames.loc[common, column] for name, frames in pairs.items()})
        # A classical method has no iterations. The column must still be compared for the other settings.
        shared = values.dropna(axis="columns", how="all").dropna()
        for name, mean in shared.mean().items() if len(shared) else ():
            means[str(name)][column] = float(mean)
    return {"pairs": len(common), "means": means}


def comparison(metrics: Metrics) -> list[ComparedRow]:
    """The comparison of settings on the pairs that all of them processed; counts are over all frames."""
    settings, means = metrics["settings"], metrics["comparison"]["means"]
    rows = [ComparedRow("frames with flow", [str(figures["frames"]["processed"]) for figures in settings])]
    if any(figures["setting"].get("budget_ms") for figures in settings):
        rows.append(ComparedRow("late", [percent(figures["deadline_miss_share"]) for figures in settings]))
    solving = {n for n, figures in enumerate(settings) if figures["setting"].get("method", "deq") == "deq"}
    for column, title, unit, digits in COMPARISON:
        known = {n: value for n, one in enumerate(settings) if (value := means[one["name"]].get(column)) is not None}
        if column == "iterations":
            known = {n: value for n, value in known.items() if n in solving}
        if not known:
            continue
        values = [number(known.get(n), digits) for n in range(len(settings))]
        best = {n for n in known if values[n] == number(min(known.values()), digits)}
        if column in NEITHER_GOOD_NOR_BAD or len({values[n] for n in known}) < 2:
            best = set()
        rows.append(ComparedRow(f"{title} [{unit}]" if unit else title, values, best))
    return rows


def terminal_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """(what, value) for a table on the terminal."""
    shown = headline(metrics)
    return [(one.title, f"{one.value} {one.unit}".rstrip() + (f"   ({one.note})" if one.note else "")) for one in shown]


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
    path: Path, settings: Sequence[SettingEntry], frames: pd.DataFrame, metrics: Metrics,
    galleries: Mapping[str, Gallery],
) -> None:  # fmt: skip
    """Write the page of a recording; the main setting is the first one.

    :raises MediaError: if it cannot be written.
    """
    main = metrics["settings"][0]
    error = error_measure(main)
    by_setting = {setting.name: frames[frames.setting == setting.name] for setting in settings}
    measured = {name for figures in metrics["settings"] for name in figures["measures"]}
    # The key of the flow colours: each place has the colour of the vector leading to it.
    vectors = np.dstack(np.meshgrid(*2 * [np.linspace(-1, 1, 96, dtype=np.float32)]))
    vectors[np.hypot(*np.moveaxis(vectors, 2, 0)) > 1] = 0
    write_page(
        path, "report.html", metrics=metrics, mode=mode_of(metrics), settings=settings,
        headline=headline(metrics), comparison=comparison(metrics),
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
    metrics: Metrics | None = None


def write_overview(path: Path, evaluated: Sequence[Evaluated]) -> None:
    """Write the page of several recordings, with the most important figures of each.

    :raises MediaError: if it cannot be written, or is somebody else's page.
    """
    title = "Optical flow reports"
    if path.exists() and f"<title>{title}</title>" not in path.read_text(encoding="utf-8", errors="replace"):
        raise MediaError(f"{path} is there already and is not an overview of recordings; choose another --out")
    cells = {
        one.name: {f"{each.title} [{each.unit}]".removesuffix(" []"): each for each in headline(one.metrics)}
        for one in evaluated
        if one.metrics is not None
    }
    headings = dict.fromkeys(heading for own in cells.values() for heading in own)
    write_page(path, "overview.html", title=title, evaluated=evaluated, cells=cells, headings=headings, report=REPORT)
