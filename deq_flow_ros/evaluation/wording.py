# SPDX-License-Identifier: Apache-2.0
"""The figures that matter most, worded for people: on the terminal, at the head of the report, and in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deq_flow_ros.evaluation.gallery import RANKED_BY
from deq_flow_ros.evaluation.measures import MEASURES

Metrics = Mapping[str, Any]
"""As ``summarise`` gives them."""
MODES = {
    "offline": "every frame, one after the other",
    "realtime": "as on the robot, simulated from measured costs",
    "live": "through the node over DDS",
}
BY_THE_CLOCK = "budgets are kept by this machine's clock, so that another run gives other figures"
"""Of a run over every frame with a budget; a simulated one can be repeated."""
COMPARISON = (
    ("latency_ms", "latency, mean", "ms", 1),
    ("iterations", "iterations, mean", "", 1),
    ("residual_px", "residual, mean", "px", 3),
    *((name, measure.title, measure.unit, 3 if measure.unit == "px" else 2) for name, measure in MEASURES.items()),
)
"""(column, title, unit, digits) of the rows of the table that compares settings."""
NEITHER_GOOD_NOR_BAD = ("iterations", "residual_px", "photometric_still", "epe_still_px", "static_percent")
"""Of these, less is not better: a solver that stops early has few iterations and a large residual."""


@dataclass(frozen=True)
class Figure:
    """A figure, its unit, what it is, and what to hold it against."""

    value: str
    title: str
    note: str = ""
    unit: str = ""


@dataclass(frozen=True)
class ComparedRow:
    """A figure of every setting, and the numbers of those settings that are best in it."""

    title: str
    values: list[str]
    best: set[int]


def number(value: float | None, digits: int = 2) -> str:
    """A figure with so many digits behind the point; a dash where it is not known."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share 0..1 in percent."""
    return "–" if share is None else f"{100 * share:.1f} %"


def counts(frames: Metrics) -> str:
    """How many frames came to what."""
    return f"{frames['processed']} with flow, {frames['first']} first, {frames['dropped']} dropped"


def error_measure(figures: Metrics) -> str:
    """The measure that says most about how good this setting's flow is."""
    return next((key for key in RANKED_BY if key in figures["measures"]), "photometric")


def mode(metrics: Metrics) -> str:
    """How the frames came, and what that means for another run."""
    limited = any(figures["setting"].get("budget_ms") for figures in metrics["settings"])
    return MODES[metrics["mode"]] + (f"; {BY_THE_CLOCK}" if metrics["mode"] == "offline" and limited else "")


def headline(metrics: Metrics) -> list[Figure]:
    """The figures of the main setting."""
    figures = metrics["settings"][0]
    latency, iterations, residual = figures["latency_ms"], figures["iterations"], figures["residual_px"]
    played = "as the stream was played" if metrics["run"]["played_seconds"] else "from the mean latency"
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
    """Settings compared: on the pairs that all of them processed, except for what counts frames."""
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
