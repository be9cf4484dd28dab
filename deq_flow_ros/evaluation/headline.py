# SPDX-License-Identifier: Apache-2.0
"""The figures that matter most, worded for people: on the terminal, at the head of the report, and in its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deq_flow_ros.evaluation.measures import MEASURES

Metrics = Mapping[str, Any]
"""As `summary.summarise` gives them."""


@dataclass(frozen=True)
class Figure:
    """A figure with its unit, what it is, and what to hold it against."""

    value: str
    title: str
    note: str = ""


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


_TAIL = (("p95", "95 %"), ("p99", "99 %"), ("max", "max"))


def headline(metrics: Metrics) -> list[Figure]:
    """The figures of the main setting."""
    figures = metrics["settings"][0]
    frames, latency, measures = figures["frames"], figures["latency_ms"], figures["measures"]
    budget = figures["setting"].get("budget_ms")
    shown = [
        Figure(
            str(frames["all"]), "frames",
            f"{frames['processed']} with flow, {frames['first']} first, {frames['dropped']} dropped",
        ),
        Figure(
            number(figures["fields_per_second"], 1), "flow fields per second",
            "as the stream was played" if metrics["run"]["played_seconds"] else "from the mean latency",
        ),
        Figure(
            f"{number(latency['median'], 1)} ms", "latency, median",
            ", ".join(f"{name}: {number(latency[key], 1)}" for key, name in _TAIL) + " ms",
        ),
    ]  # fmt: skip
    if budget:
        shown.append(Figure(percent(figures["deadline_miss_share"]), "late", f"budget {budget:g} ms"))
    key, still = error_measure(figures), "photometric_still"
    if key in measures:
        against = f"{number(measures[still]['mean'])} without warping" if still in measures else ""
        if key != "photometric" and "epe_still_px" in measures:
            against = f"zero flow: {number(measures['epe_still_px']['mean'])} px"
        shown.append(Figure(_with_unit(key, measures[key]["mean"]), MEASURES[key].title, against))
    if key != "photometric" and "fl_percent" in measures:
        shown.append(Figure(_with_unit("fl_percent", measures["fl_percent"]["mean"]), "Fl", "off by 3 px and 5 %"))
    if "consistency_px" in measures:
        pairs, wrong = measures["consistency_px"]["pairs"], measures["inconsistent_percent"]["mean"]
        note = f"{number(wrong, 1)} % of the pixels inconsistent, {pairs} pairs"
        shown.append(Figure(_with_unit("consistency_px", measures["consistency_px"]["mean"]), "forward-backward", note))
    if "flicker_px" in measures:
        note = f"on {number(measures['static_percent']['mean'], 1)} % of the pixels, which stand still"
        shown.append(Figure(_with_unit("flicker_px", measures["flicker_px"]["mean"]), "flicker", note))
    if (figures["iterations"]["max"] or 0) > 0:
        note = f"warm starts {percent(figures['warm_share'])}, scale {number(figures['scale']['mean'])}"
        shown.append(Figure(number(figures["iterations"]["median"], 0), "iterations, median", note))
        residual = figures["residual_px"]
        note = f"95 %: {number(residual['p95'], 3)} px"
        shown.append(Figure(f"{number(residual['median'], 3)} px", "residual, median", note))
    return shown


COMPARISON = (
    ("latency_ms", "latency, mean", "ms", 1),
    ("iterations", "iterations, mean", "", 1),
    ("residual_px", "residual, mean", "px", 3),
    *((name, measure.title, measure.unit, 3 if measure.unit == "px" else 2) for name, measure in MEASURES.items()),
)
"""(column, title, unit, digits) of the table that compares settings."""
_TELLS_NOTHING = ("photometric_still", "epe_still_px", "static_percent")


def comparison(metrics: Metrics) -> list[tuple[str, list[str], int | None]]:
    """(what, value of each setting, which is best) by row; on the pairs that all settings processed."""
    settings, means = metrics["settings"], metrics["comparison"]["means"]
    rows: list[tuple[str, list[str], int | None]] = [
        (title, [text(figures) for figures in settings], None)
        for title, text in (
            ("frames with flow", lambda figures: str(figures["frames"]["processed"])),
            ("late", lambda figures: percent(figures["deadline_miss_share"])),
        )
    ]
    for column, title, unit, digits in COMPARISON:
        values = [means[figures["name"]].get(column) for figures in settings]
        if all(value is None for value in values) or (column == "iterations" and not any(values)):
            continue
        known = [value for value in values if value is not None]
        ranked = column not in _TELLS_NOTHING and len(known) > 1 and len({f"{v:.{digits}f}" for v in known}) > 1
        best = values.index(min(known)) if ranked and column != "iterations" else None
        rows.append((f"{title} [{unit}]" if unit else title, [number(value, digits) for value in values], best))
    return rows


def terminal_rows(metrics: Metrics) -> Sequence[tuple[str, str]]:
    """(what, value) for a table on the terminal."""
    return [
        (figure.title, figure.value + (f"   ({figure.note})" if figure.note else "")) for figure in headline(metrics)
    ]


def _with_unit(name: str, value: float | None) -> str:
    unit = MEASURES[name].unit
    return f"{number(value, 3 if unit == 'px' and (value or 1) < 0.1 else 2)} {unit}"
