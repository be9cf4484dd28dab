# SPDX-License-Identifier: Apache-2.0
"""The most important figures in words: for the terminal, the head of the report, and its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deq_flow_ros.evaluation.gallery import RANKED_BY
from deq_flow_ros.evaluation.measures import MEASURES

Metrics = Mapping[str, Any]
"""The result of ``summarise``."""
MODES = {
    "offline": "every frame, one after the other",
    "realtime": "timing as on a robot, simulated from measured costs",
    "live": "through the node over DDS",
}
BY_THE_CLOCK = "budgets are kept by the clock of this machine, so another run gives other figures"
"""Said of a run with a budget that is not simulated."""
COMPARISON = (
    ("latency_ms", "latency, mean", "ms", 1),
    ("iterations", "iterations, mean", "", 1),
    ("residual_px", "residual, mean", "px", 3),
    *((name, measure.title, measure.unit, 3 if measure.unit == "px" else 2) for name, measure in MEASURES.items()),
)
"""(column, title, unit, digits) of each row in the table that compares settings."""
NEITHER_GOOD_NOR_BAD = ("iterations", "residual_px", "photometric_still", "epe_still_px", "static_percent")
"""Figures for which less is not better. A solver that stops early has few iterations and a large residual."""


@dataclass(frozen=True)
class Figure:
    """A figure with its title, its unit, and a note to compare it with."""

    value: str
    title: str
    note: str = ""
    unit: str = ""


@dataclass(frozen=True)
class ComparedRow:
    """A figure for every setting, and the numbers of the settings that are best in it."""

    title: str
    values: list[str]
    best: set[int]


def number(value: float | None, digits: int = 2) -> str:
    """A figure with this number of digits after the point; a dash if it is not known."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share 0..1 in percent."""
    return "–" if share is None else f"{100 * share:.1f} %"


def counts(frames: Metrics) -> str:
    """The numbers of frames by outcome."""
    return f"{frames['processed']} with flow, {frames['first']} first, {frames['dropped']} dropped"


def error_measure(figures: Metrics) -> str:
    """The measure that says most about the quality of this setting's flow."""
    return next((key for key in RANKED_BY if key in figures["measures"]), "photometric")


def mode(metrics: Metrics) -> str:
    """The mode of the run in words, and whether it can be repeated."""
    limited = any(figures["setting"].get("budget_ms") for figures in metrics["settings"])
    return MODES[metrics["mode"]] + (f"; {BY_THE_CLOCK}" if metrics["mode"] == "offline" and limited else "")


def headline(metrics: Metrics) -> list[Figure]:
    """The figures of the main setting."""
    figures = metrics["settings"][0]
    latency, iterations, residual = figures["latency_ms"], figures["iterations"], figures["residual_px"]
    played = "while the stream was played" if metrics["run"]["played_seconds"] else "from the mean latency"
    tail = f"95 %: {number(latency['p95'], 1)}, 99 %: {number(latency['p99'], 1)}, max: {number(latency['max'], 1)}"
    shown = [
        Figure(str(figures["frames"]["all"]), "frames", counts(figures["frames"])),
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
    values = [number(mean[name], 3 if mean[name] < 0.1 else 2) for name in shown]
    titles = [(MEASURES[name].title, notes.get(name, ""), MEASURES[name].unit) for name in shown]
    return [Figure(value, *title) for value, title in zip(values, titles, strict=True)]


def comparison(metrics: Metrics) -> list[ComparedRow]:
    """The comparison of settings on the pairs that all of them processed; counts are over all frames."""
    settings, means = metrics["settings"], metrics["comparison"]["means"]
    rows = [ComparedRow("frames with flow", [str(figures["frames"]["processed"]) for figures in settings], set())]
    if any(figures["setting"].get("budget_ms") for figures in settings):
        rows.append(ComparedRow("late", [percent(figures["deadline_miss_share"]) for figures in settings], set()))
    for column, title, unit, digits in COMPARISON:
        solving = [figures["setting"].get("method", "deq") == "deq" for figures in settings]
        known = {
            n: value for n, figures in enumerate(settings)
            if (value := means[figures["name"]].get(column)) is not None and (column != "iterations" or solving[n])
        }  # fmt: skip
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
    notes = [(f, f"   ({f.note})" if f.note else "") for f in headline(metrics)]
    return [(f.title, f"{f.value} {f.unit}".rstrip() + note) for f, note in notes]
