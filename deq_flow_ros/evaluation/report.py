# SPDX-License-Identifier: Apache-2.0
"""The report of a run: a single HTML file that needs neither a network nor other files."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deq_flow_ros.evaluation import summary
from deq_flow_ros.evaluation.gallery import Gallery, panels
from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.records import DROPPED, PROCESSED
from deq_flow_ros.evaluation.summary import SettingEntry
from deq_flow_ros.imaging.pictures import data_uri, flow_to_color
from deq_flow_ros.recordings.files import write_text

REPORT, METRICS, FRAMES = "report.html", "metrics.json", "frames.csv"
VIDEO, ANIMATION = "flow.mp4", "flow.webp"
"""Names of the result files."""


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template of this package.

    :raises MediaError: if the file cannot be written.
    """
    loader = PackageLoader("deq_flow_ros.evaluation")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"number": summary.number, "percent": summary.percent}
    write_text(path, pages.get_template(template).render(**values))


def write_report(
    path: Path, settings: Sequence[SettingEntry], frames: pd.DataFrame, metrics: summary.Metrics,
    galleries: Mapping[str, Gallery],
) -> None:  # fmt: skip
    """Write the HTML file.

    :param settings: the settings, the main one first.
    :param frames: from ``read_frames``.
    :param metrics: from ``summarise``.
    :param galleries: by setting.
    :raises MediaError: if it cannot be written.
    """
    main = metrics["settings"][0]
    error = summary.error_measure(main)
    by_setting = {setting.name: frames[frames.setting == setting.name] for setting in settings}
    stages = {name: values["mean"] for name, values in main["stage_ms"].items() if values["mean"]}
    measured = {name for figures in metrics["settings"] for name in figures["measures"]}
    # The key of the flow colours: each place has the colour of the vector leading to it.
    vectors = np.dstack(np.meshgrid(*2 * [np.linspace(-1, 1, 96, dtype=np.float32)]))
    vectors[np.hypot(*np.moveaxis(vectors, 2, 0)) > 1] = 0
    write_page(
        path, "report.html", metrics=metrics, mode=summary.mode(metrics), settings=settings,
        headline=summary.headline(metrics), comparison=summary.comparison(metrics),
        plots=run_plots(by_setting, main["setting"].get("budget_ms"), error), stages=stages, error=MEASURES[error],
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


SIZE = (4.9, 2.6)
"""In inches. Small, so that the text is legible on a phone, and two plots fit into a row elsewhere."""
MOST_DOTS, PARTS = 400, 160
"""A series with more than ``MOST_DOTS`` values is drawn as a line and a band, in ``PARTS`` parts."""
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#6b7280")
BAD, MUTED = "#c53030", "#5a6676"


def run_plots(frames: Mapping[str, pd.DataFrame], budget_ms: float | None, error: str) -> list[tuple[str, str, str]]:
    """The plots of a run that have something to show, of the rows of ``frames.csv`` by setting, the main one first.

    :param error: the measure that says most about the quality of the flow.
    :returns: title, column, and address of the image.
    """
    frames = dict(list(frames.items())[: len(COLOURS)])
    main, coloured = next(iter(frames.values())), list(zip(frames.items(), COLOURS, strict=False))
    # The axis shows time only if the stamps always increase.
    timed = all(own.stamp_ns.is_monotonic_increasing and own.stamp_ns.is_unique for own in frames.values())
    start_ns = min((own.stamp_ns.iloc[0] for own in frames.values() if len(own)), default=0)
    time = "stream time [s]" if timed else "frame"

    def x_of(own: pd.DataFrame) -> np.ndarray:
        return ((own.stamp_ns - start_ns) * 1e-9 if timed else own["index"]).to_numpy(float)

    def points(axes: Axes, own: pd.DataFrame, column: str, colour: str, label: str | None, **more: Any) -> None:
        known = own[(own.outcome == PROCESSED) & own[column].notna()]
        _draw(axes, x_of(known), known[column].to_numpy(), colour, label, **more)
        axes.set_xlim(0, 1.02 * max(x_of(main), default=0) or 1)

    def latency(axes: Axes) -> None:
        late = main.over_budget == 1
        points(axes, main[~late], "latency_ms", COLOURS[0], "in time" if budget_ms else None)
        points(axes, main[late], "latency_ms", BAD, "late", thinned=True)
        if budget_ms:
            axes.axhline(budget_ms, color=BAD, linewidth=1, linestyle="--", label="budget")
        times = _thinned(x_of(main[main.outcome == DROPPED]))
        if times.size:
            axes.plot(times, np.zeros(times.size), "|", color=MUTED, markersize=6, label="dropped")

    def latencies(axes: Axes) -> None:
        shares = np.linspace(0, 100, 101)
        for (name, own), colour in coloured:
            if own.latency_ms.notna().any():
                axes.plot(np.nanpercentile(own.latency_ms, shares), shares, color=colour, label=name)
        if budget_ms:
            axes.axvline(budget_ms, color=BAD, linewidth=1, linestyle="--", label="budget")

    def iterations(axes: Axes) -> None:
        warm = main.warm == 1
        points(axes, main[warm], "iterations", COLOURS[0], "warm start")
        points(axes, main[~warm], "iterations", COLOURS[1], "cold start")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    def of_all(column: str, baseline: str = "", baseline_label: str = "") -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            if baseline:
                points(axes, main, baseline, MUTED, baseline_label)
            for (name, own), colour in coloured:
                label = name if len(frames) > 1 else ("flow" if baseline else None)
                points(axes, own, column, colour, label, band=len(frames) == 1)

        return draw

    def residual(axes: Axes) -> None:
        of_all("residual_px")(axes)
        positive = known.residual_px[known.residual_px > 0]
        if positive.max() > 20 * positive.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    still = ("photometric_still", "without warping") if error == "photometric" else ("epe_still_px", "zero flow")
    known = pd.concat(frames.values()).select_dtypes("number")
    plots = (
        ("Latency", "ms", "latency_ms", latency, time),
        ("Latency of all frames", "% of the frames", "latency_ms", latencies, "latency [ms]"),
        (MEASURES[error].title.capitalize(), MEASURES[error].unit, error, of_all(error, *still), time),
        ("Forward-backward error", "px", "consistency_px", of_all("consistency_px"), time),
        ("Flicker", "px", "flicker_px", of_all("flicker_px"), time),
        ("Iterations", "iterations", "iterations", iterations, time),
        ("Residual", "px", "residual_px", residual, time),
        ("Processing scale", "scale", "scale", lambda axes: points(axes, main, "scale", COLOURS[0], None), time),
    )
    return [
        (title, column, _svg(draw, x, y))
        for title, y, column, draw, x in plots
        if (known[column] > 0).any() and (column != "scale" or main["scale"].nunique() > 1)
    ]


def _draw(
    axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str | None, band: bool = True, thinned: bool = False
) -> None:
    """Draw every value as a dot, or a long series as the median and, with ``band``, the middle 90 % of each part; if
    ``thinned``, as some of its dots, for events that happen now and then.
    """
    if 0 < x.size <= MOST_DOTS or (x.size and thinned):
        style = "." if band else ".-"
        axes.plot(_thinned(x), _thinned(y), style, color=colour, markersize=3.5, linewidth=0.7, label=label)
    elif x.size:
        parts = np.array_split(np.arange(x.size), PARTS)
        centres = [x[part].mean() for part in parts]
        low, middle, high = np.array([np.percentile(y[part], (5, 50, 95)) for part in parts]).T
        if band:
            axes.fill_between(centres, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(centres, middle, color=colour, linewidth=1.2, label=label)


def _thinned(values: np.ndarray) -> np.ndarray:
    return values[:: -(-values.size // MOST_DOTS) or 1]


def _svg(draw: Callable[[Axes], None], x_label: str, y_label: str) -> str:
    with matplotlib.style.context(Path(__file__).with_name("plots.mplstyle")):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(xlabel=x_label, ylabel=y_label)
        if axes.get_yscale() == "linear":
            axes.set_ylim(0, 1.06 * axes.dataLim.ymax)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=10.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + b64encode(buffer.getvalue()).decode()
