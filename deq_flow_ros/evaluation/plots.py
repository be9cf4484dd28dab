# SPDX-License-Identifier: Apache-2.0
"""Plots of a run over time, as SVG to stand inside of an HTML page, by matplotlib. Their colours are the page's."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullFormatter

from deq_flow_ros.evaluation.results import DROPPED, PROCESSED, Series

SIZE = (4.9, 2.6)
"""Inches; small, so that the writing is as large as the page's on a phone, and two stand side by side elsewhere."""
MOST_DOTS = 400
"""A longer series is drawn as a band and a line of so many parts."""
PARTS = 160

# Stand-ins that are replaced by the page's variables: matplotlib knows no others than real colours.
INK, GRID, MUTED, BAD = "#010101", "#020202", "#030303", "#040404"
COLOURS = ("#050501", "#050502", "#050503", "#050504", "#050505", "#050506")
_VARIABLES = {
    INK: "--ink", GRID: "--line", MUTED: "--muted", BAD: "--bad", **{c: f"--c{n}" for n, c in enumerate(COLOURS, 1)}
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


class RunPlots:
    """The plots of one run; each method returns an SVG element, or "" where there is nothing to show.

    :param series: by the name of the setting, the main one first.
    """

    def __init__(self, series: Mapping[str, Series]) -> None:
        self._series = dict(list(series.items())[: len(COLOURS)])
        self._main = next(iter(series.values()))
        self._drawn = 0
        stamps = [columns.stamp_ns for columns in series.values() if len(columns)]
        # Without a time that only goes on there is no axis of time.
        self._timed = bool(stamps) and all((np.diff(stamp) > 0).all() for stamp in stamps)
        self._start_ns = min((int(stamp[0]) for stamp in stamps), default=0)

    def latency(self, budget_ms: float | None) -> str:
        """Latency of each processed frame of the main setting, and when frames were dropped."""

        def draw(axes: Axes) -> None:
            late = self._main.number("over_budget") == 1
            self._points(axes, self._main, "latency_ms", COLOURS[0], "in time" if budget_ms else None, ~late)
            self._points(axes, self._main, "latency_ms", BAD, "late", late, thinned=True)
            if budget_ms:
                axes.axhline(budget_ms, color=BAD, linewidth=1, linestyle="--", label="budget")
            dropped = self._main.outcome(DROPPED)
            if dropped.any():
                times = _thinned(self._x(self._main)[dropped])
                axes.plot(times, np.zeros(len(times)), "|", color=MUTED, markersize=6, label="dropped")
            _from_zero(axes)

        return self._plot("ms", draw, self._has("latency_ms"))

    def latencies(self, budget_ms: float | None) -> str:
        """Of every setting, the share of frames within a latency."""

        def draw(axes: Axes) -> None:
            for (name, series), colour in zip(self._series.items(), COLOURS, strict=False):
                values = np.sort(series.number("latency_ms")[np.isfinite(series.number("latency_ms"))])
                if values.size:
                    shares = np.linspace(0, 100, min(values.size, 200) + 1)[1:]
                    # Outwards, so that the last point is the largest value.
                    points = np.percentile(values, shares, method="higher")
                    axes.step(points, shares, where="post", color=colour, label=name)
            if budget_ms:
                axes.axvline(budget_ms, color=BAD, linewidth=1, linestyle="--", label="budget")
            axes.set_xscale("log")
            _plain(axes.xaxis)
            axes.set_ylim(0, 102)
            axes.set_xlabel("latency [ms]")

        return self._plot("% of the frames", draw, self._has("latency_ms"), timed=False)

    def iterations(self) -> str:
        """Iterations of each processed frame of the main setting."""

        def draw(axes: Axes) -> None:
            warm = self._main.number("warm") == 1
            self._points(axes, self._main, "iterations", COLOURS[0], "warm start", warm)
            self._points(axes, self._main, "iterations", COLOURS[1], "cold start", ~warm)
            _from_zero(axes)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))

        return self._plot("iterations", draw, bool((self._main.number("iterations") > 0).any()))

    def scale(self) -> str:
        """Processing scale of the main setting."""

        def draw(axes: Axes) -> None:
            self._points(axes, self._main, "scale", COLOURS[0], None)
            _from_zero(axes)

        return self._plot("scale", draw, len(set(self._finite("scale"))) > 1)

    def of_all(self, column: str, label: str, baseline: str = "", baseline_label: str = "", log: bool = False) -> str:
        """A column of every setting; with a baseline of the main one."""

        def draw(axes: Axes) -> None:
            if baseline:
                self._points(axes, self._main, baseline, MUTED, baseline_label)
            names = list(self._series)
            for number, (name, series) in enumerate(self._series.items()):
                shown = name if len(names) > 1 else ("flow" if baseline else None)
                self._points(axes, series, column, COLOURS[number], shown, band=len(names) == 1)
            positive = [values[values > 0] for series in self._series.values() for values in [series.number(column)]]
            known = np.concatenate(positive)
            if log and known.size and known.max() > 20 * known.min():
                axes.set_yscale("log")
                _plain(axes.yaxis)
            else:
                _from_zero(axes)

        return self._plot(label, draw, self._has(column))

    def _has(self, column: str) -> bool:
        return any(np.isfinite(series.number(column)).any() for series in self._series.values())

    def _finite(self, column: str) -> np.ndarray:
        values = self._main.number(column)
        return values[np.isfinite(values)]

    def _x(self, series: Series) -> np.ndarray:
        return (series.stamp_ns - self._start_ns) * 1e-9 if self._timed else series.index.astype(float)

    def _points(
        self, axes: Axes, series: Series, column: str, colour: str, label: str | None,
        chosen: np.ndarray | None = None, band: bool = True, thinned: bool = False,
    ) -> None:  # fmt: skip
        """Every value as a dot; of a long series the median and, if `band`, the middle 90 % of each part; or, where
        `thinned`, which is for what happens now and then, some of the dots.
        """
        values = series.number(column)
        known = np.isfinite(values) & series.outcome(PROCESSED) & (True if chosen is None else chosen)
        x, y = self._x(series)[known], values[known]
        if not x.size:
            return
        if x.size <= MOST_DOTS or thinned:
            style = "" if band else "-"
            axes.plot(_thinned(x), _thinned(y), f".{style}", color=colour, markersize=3.5, linewidth=0.7, label=label)
            return
        parts = [part for part in np.array_split(np.arange(x.size), PARTS) if part.size]
        centres = [x[part].mean() for part in parts]
        low, middle, high = np.array([np.percentile(y[part], (5, 50, 95)) for part in parts]).T
        if band:
            axes.fill_between(centres, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(centres, middle, color=colour, linewidth=1.2, label=label)

    def _plot(self, label: str, draw: Callable[[Axes], None], shown: bool, timed: bool = True) -> str:
        if not shown:
            return ""
        # Its own salt: identifiers of two plots in one page must not be the same.
        self._drawn += 1
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": str(self._drawn)}):
            figure = Figure(figsize=SIZE, layout="constrained")
            axes = figure.subplots()
            draw(axes)
            axes.set_ylabel(label)
            if timed:
                axes.set_xlabel("stream time [s]" if self._timed else "frame")
            if axes.get_legend_handles_labels()[0]:
                figure.legend(loc="outside upper center", ncols=4, fontsize=10.5)
            return _inline(figure, label)


class _PlainNumbers(LogFormatter):
    """Numbers as people write them on a logarithmic axis; matplotlib knows which ones there is room for."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _plain(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_formatter(_PlainNumbers())
    if high < 10 * low:
        axis.set_minor_formatter(_PlainNumbers(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        return
    # Three numbers a decade, about equally far apart; matplotlib's own choice of more than that overlaps.
    axis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axis.set_minor_formatter("{x:g}" if high < 1000 * low else NullFormatter())


def _from_zero(axes: Axes) -> None:
    # From the data, not from the limits: autoscaling leaves room beneath, which zero is not to have.
    top = axes.dataLim.ymax
    axes.set_ylim(0, 1.06 * top if np.isfinite(top) and top > 0 else 1)


def _thinned(values: np.ndarray) -> np.ndarray:
    return values[:: -(-values.size // MOST_DOTS) or 1]


def _inline(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # As wide as there is room; named for those who cannot see it; groups without their names, which are in every plot.
    svg = re.sub(
        r'<svg[^>]*(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(label)}">', svg, count=1
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def stage_bars(stage_ms: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, float, float]]:
    """(stage, mean ms, share of the longest) of the stages that took any time, in the order of the work."""
    means = {name: values["mean"] or 0.0 for name, values in stage_ms.items()}
    longest = max(means.values(), default=0.0)
    return [(name, mean, mean / longest) for name, mean in means.items() if mean > 0]
