# SPDX-License-Identifier: Apache-2.0
"""Plots of a run over time, as SVG images for an HTML page.

They are drawn for a light page and have no background; a dark page inverts them.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.records import DROPPED, PROCESSED

SIZE = (4.9, 2.6)
"""In inches. Small, so that the text is legible on a phone, and two plots fit into a row elsewhere."""
MOST_DOTS, PARTS = 400, 160
"""A series with more than ``MOST_DOTS`` values is drawn as a line and a band, in ``PARTS`` parts."""
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#6b7280")
BAD, MUTED = "#c53030", "#5a6676"


def run_plots(frames: Mapping[str, pd.DataFrame], budget_ms: float | None, error: str) -> list[tuple[str, str, str]]:
    """The plots of a run that have something to show: title, column, and address of the image.

    :param frames: rows of ``frames.csv`` by setting, the main one first.
    :param error: the measure that says most about the quality of the flow.
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
    """Draw every value as a dot, or a long series as the median and, with ``band``, the middle 90 % of each part.

    :param thinned: draw some of the dots instead, for events that happen now and then.
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
