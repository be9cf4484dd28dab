# SPDX-License-Identifier: Apache-2.0
"""Plots of a run over time, as SVG, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deq_flow_ros.media.analysis import PairResult
from deq_flow_ros.media.flow_recording import FrameReport

BLUE, ORANGE, GREY, RED, GREEN = "#2b6cb0", "#dd6b20", "#a0aec0", "#c53030", "#2f855a"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deq_flow_ros",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#4a5568",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


class RunPlots:
    """The plots of one run; each method returns an SVG document. Times are stream seconds since the first frame."""

    def __init__(self, reports: Sequence[FrameReport], pairs: Sequence[PairResult]) -> None:
        self._start_ns = min((report.stamp_ns for report in reports), default=0)
        self._end = max((self.time(report) for report in reports), default=1.0) or 1.0
        self._processed = [report for report in reports if report.outcome == "processed"]
        self._dropped = [report for report in reports if report.outcome == "dropped"]
        self._pairs = pairs

    def time(self, report: FrameReport) -> float:
        """Stream time of a report in s."""
        return (report.stamp_ns - self._start_ns) * 1e-9

    def latency(self) -> str:
        """Latency of every processed frame against the budget, and when frames were dropped."""

        def draw(axes: Axes) -> None:
            over = [report for report in self._processed if report.flag("over_budget")]
            kept = [report for report in self._processed if not report.flag("over_budget")]
            self._dots(axes, kept, "latency_ms", BLUE, "within the budget")
            self._dots(axes, over, "latency_ms", RED, "over the budget")
            budgets = [report.number("budget_ms") for report in self._processed]
            if np.isfinite(budgets).any():
                budget = float(np.nanmedian(budgets))
                axes.axhline(budget, color=RED, linewidth=1, linestyle="--", label=f"budget {budget:g} ms")
            if self._dropped:
                times = [self.time(report) for report in self._dropped]
                axes.plot(times, np.zeros(len(times)), "|", color=GREY, markersize=7, label="frame dropped")
            axes.set_ylim(bottom=0)
            axes.set_ylabel("latency [ms]")

        return self._plot(draw)

    def iterations(self) -> str:
        """Solver iterations per frame."""

        def draw(axes: Axes) -> None:
            warm = [report for report in self._processed if report.flag("warm")]
            cold = [report for report in self._processed if not report.flag("warm")]
            self._dots(axes, warm, "iterations", BLUE, "warm start")
            self._dots(axes, cold, "iterations", ORANGE, "cold start")
            axes.set_ylim(bottom=0)
            axes.set_ylabel("iterations")

        return self._plot(draw)

    def residual(self) -> str:
        """Residual of the returned flow per frame: how far it is from a fixed point."""

        def draw(axes: Axes) -> None:
            self._dots(axes, self._processed, "residual_px", BLUE, None)
            if any(report.number("residual_px") > 0 for report in self._processed):
                axes.set_yscale("log")
            axes.set_ylabel("residual [px]")

        return self._plot(draw)

    def error(self, exact: bool) -> str:
        """Endpoint error where the exact flow is known, else photometric error; with the same for no flow at all."""
        key, label = (
            ("epe_visible", "endpoint error [px]") if exact else ("photometric", "photometric error [grey levels]")
        )

        def draw(axes: Axes) -> None:
            times = [self.time(pair.report) for pair in self._pairs]
            name = "zero flow" if exact else "without warping"
            axes.plot(times, [getattr(pair.zero, key) for pair in self._pairs], color=GREY, linewidth=1.2, label=name)
            name = "flow" if exact else "warped by the flow"
            axes.plot(
                times, [getattr(pair.warm, key) for pair in self._pairs], ".-", color=BLUE, linewidth=0.8, label=name
            )
            axes.set_ylim(bottom=0)
            axes.set_ylabel(label)

        return self._plot(draw)

    def cold_against_warm(self, exact: bool) -> str:
        """The pairs that were solved again from a cold start: error and residual beside those of the warm start."""
        compared = [pair for pair in self._pairs if pair.cold is not None]
        key, error = (
            ("epe_visible", "endpoint error [px]") if exact else ("photometric", "photometric error [grey levels]")
        )
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(9.2, 2.9), layout="constrained")
            for axes, name, title in zip(
                figure.subplots(1, 2), (key, "residual"), (error, "residual, RMS [px]"), strict=True
            ):
                times = [self.time(pair.report) for pair in compared]
                cold = [getattr(pair.cold, name) for pair in compared]
                warm = [getattr(pair.warm, name) for pair in compared]
                axes.vlines(times, warm, cold, color=GREY, linewidth=1)
                label = "cold start, same iterations plus a coarse-to-fine start"
                axes.plot(times, cold, "o", color=ORANGE, markersize=5, label=label)
                axes.plot(times, warm, "o", color=BLUE, markersize=5, label="warm start, as streamed")
                axes.set_ylim(bottom=0)
                axes.set_ylabel(title)
                axes.set_xlabel("stream time [s]")
                axes.set_xlim(-0.02 * self._end, 1.02 * self._end)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
            return _svg(figure)

    def stages(self, stage_ms: dict[str, Any]) -> str:
        """Mean time of the stages of one update, in the order given."""
        colors = (GREY, "#b7791f", "#805ad5", "#d53f8c", GREEN, ORANGE, BLUE, "#319795", "#718096", RED)
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(9.2, 1.6), layout="constrained")
            axes = figure.subplots()
            left = 0.0
            for number, (name, values) in enumerate(stage_ms.items()):
                mean = values["mean"] or 0.0
                axes.barh(0, mean, left=left, color=colors[number % len(colors)], label=f"{name} {mean:.1f}")
                left += mean
            axes.set_yticks([])
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("mean time per update [ms]")
            figure.legend(loc="outside upper center", ncols=5)
            return _svg(figure)

    def _dots(self, axes: Axes, reports: Sequence[FrameReport], key: str, color: str, label: str | None) -> None:
        if reports:
            times = [self.time(report) for report in reports]
            axes.plot(times, [report.number(key) for report in reports], ".", color=color, markersize=5, label=label)

    def _plot(self, draw: Callable[[Axes], None]) -> str:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(9.2, 2.3), layout="constrained")
            axes = figure.subplots()
            draw(axes)
            axes.set_xlim(-0.02 * self._end, 1.02 * self._end)
            axes.set_xlabel("stream time [s]")
            if axes.get_legend_handles_labels()[0]:
                figure.legend(loc="outside upper center", ncols=4)
            return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
