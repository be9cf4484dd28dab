# SPDX-License-Identifier: Apache-2.0
"""The figures that matter most, worded for people: on the terminal, at the head of the report, and in its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.summary import BY_THE_CLOCK, MODES

Metrics = Mapping[str, Any]
"""As `summary.summarise` gives them."""


@dataclass(frozen=True)
class Figure:
    """A figure, its unit, what it is, and what to hold it against."""

    value: str
    title: str
    note: str = ""
    unit: str = ""


def number(value: float | None, digits: int = 2) -> str:
    """A figure with so many digits behind the point; a dash where it is not known."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share 0..1."""
    return "–" if share is None else f"{100 * share:.1f} %"


def error_measure(figures: Metrics) -> str:
    """The measure that tells best how good this setting's flow is."""
    measures = figures["measures"]
    return next((key for key in ("epe_visible_px", "epe_px") if key in measures), "photometric")


def mode(metrics: Metrics) -> str:
    """How the frames came, and what that means for another run."""
    limited = any(figures["setting"].get("budget_ms") for figures in metrics["settings"])
    return MODES[metrics["mode"]] + (f"; {BY_THE_CLOCK}" if metrics["mode"] == "offline" and limited else "")


_TAIL = (("p95", "95 %"), ("p99", "99 %"), ("max", "max"))


def headline(metrics: Metrics) -> list[Figure]:
    """The figures of the main setting."""
    figures = metrics["settings"][0]
    frames, latency, measures = figures["frames"], figures["latency_ms"], figures["measures"]
    counts = f"{frames['processed']} with flow, {frames['first']} first, {frames['dropped']} dropped"
    played = "as the stream was played" if metrics["run"]["played_seconds"] else "from the mean latency"
    tail = ", ".join(f"{name}: {number(latency[key], 1)}" for key, name in _TAIL)
    shown = [
        Figure(str(frames["all"]), "frames", counts),
        Figure(number(figures["fields_per_second"], 1), "flow fields per second", played),
        Figure(number(latency["median"], 1), "latency, median", tail, "ms"),
    ]
    if budget := figures["setting"].get("budget_ms"):
        shown.append(Figure(percent(figures["deadline_miss_share"]), "late", f"budget {budget:g} ms"))
    shown += _quality(measures, error_measure(figures))
    if (figures["iterations"]["max"] or 0) > 0:
        note = f"warm starts {percent(figures['warm_share'])}, scale {number(figures['scale']['mean'])}"
        shown.append(Figure(number(figures["iterations"]["median"], 0), "iterations, median", note))
        residual = figures["residual_px"]
        note = f"95 %: {number(residual['p95'], 3)}, max: {number(residual['max'], 3)}"
        shown.append(Figure(number(residual["median"], 3), "residual, median", note, "px"))
    return shown


def _quality(measures: Metrics, error: str) -> list[Figure]:
    mean = {name: values["mean"] for name, values in measures.items()}
    notes = {}
    if "photometric_still" in mean:
        notes["photometric"] = f"without warping: {number(mean['photometric_still'])}"
    if "epe_still_px" in mean:
        notes["epe_visible_px"] = notes["epe_px"] = f"zero flow: {number(mean['epe_still_px'])}"
    notes["fl_percent"] = "off by more than 3 px and 5 %"
    if "consistency_px" in mean:
        pairs = measures["consistency_px"]["pairs"]
        notes["consistency_px"] = (
            f"{number(mean['inconsistent_percent'], 1)} % of the pixels inconsistent; {pairs} pair{'s' * (pairs > 1)}"
        )
    if "static_percent" in mean:
        notes["flicker_px"] = f"on the {number(mean['static_percent'], 1)} % of the pixels that stand still"
    return [
        Figure(number(mean[name], 3 if mean[name] < 0.1 else 2), MEASURES[name].title, note, MEASURES[name].unit)
        for name in dict.fromkeys((error, "fl_percent", "consistency_px", "flicker_px"))
        if name in mean
        for note in (notes.get(name, ""),)
    ]


COMPARISON = (
    ("latency_ms", "latency, mean", "ms", 1),
    ("iterations", "iterations, mean", "", 1),
    ("residual_px", "residual, mean", "px", 3),
    *((name, measure.title, measure.unit, 3 if measure.unit == "px" else 2) for name, measure in MEASURES.items()),
)
"""(column, title, unit, digits) of the table that compares settings."""
_TELL_NOTHING = ("iterations", "residual_px", "photometric_still", "epe_still_px", "static_percent")
"""Of these, less is not better: a solver that stops early has few iterations and a large residual."""


def comparison(metrics: Metrics) -> list[tuple[str, list[str], set[int]]]:
    """(what, value of each setting, which are best) by row; on the pairs that all settings processed."""
    settings, means = metrics["settings"], metrics["comparison"]["means"]
    rows: list[tuple[str, list[str], set[int]]] = [
        ("frames with flow", [str(figures["frames"]["processed"]) for figures in settings], set())
    ]
    if any(figures["setting"].get("budget_ms") for figures in settings):
        rows.append(("late", [percent(figures["deadline_miss_share"]) for figures in settings], set()))
    for column, title, unit, digits in COMPARISON:
        # Classical methods make no iterations.
        values = [means[figures["name"]].get(column) or None for figures in settings]
        if all(value is None for value in values):
            continue
        shown = [number(value, digits) for value in values]
        least = number(min(value for value in values if value is not None), digits)
        best = {n for n, text in enumerate(shown) if text == least}
        if column in _TELL_NOTHING or len({text for text in shown if text != number(None)}) < 2:
            best = set()
        rows.append((f"{title} [{unit}]" if unit else title, shown, best))
    return rows


def terminal_rows(metrics: Metrics) -> Sequence[tuple[str, str]]:
    """(what, value) for a table on the terminal."""
    figures = headline(metrics)
    return [(f.title, f"{f.value} {f.unit}".rstrip() + (f"   ({f.note})" if f.note else "")) for f in figures]
