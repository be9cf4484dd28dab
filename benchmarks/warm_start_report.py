# SPDX-License-Identifier: Apache-2.0
"""Summary, tables and plot of ``benchmarks.warm_start``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from benchmarks.sequences import CUTS, first_below

COLOURS = {
    "zero": "#a0aec0", "coarse": "#4a5568", "flow": "#f6ad55", "flow, warped": "#c05621", "full": "#63b3ed",
    "full, warped": "#2b6cb0", "stream": "#2f855a",
}  # fmt: skip
COLD = ("zero", "coarse")
REACHED = {"update": "update_px", "distance": "distance_rms_px", "median": "distance_median_px"}
SLACK_PX = 0.01
"""Between two solves of one pair whose images were encoded in different batches: floating point alone."""


def iterations_to(row: dict[str, Any], what: str, bound: float) -> float:
    """How many iterations a start takes to a bound; 0 if it is within from the first; infinite if it never is."""
    values = row[REACHED[what]]
    return first_below(values, bound) - (what != "update")  # a distance has the start's own before those of iterations


def summarise(rows: Sequence[dict[str, Any]], bounds: Sequence[float]) -> list[dict[str, Any]]:
    """Medians (errors: means) over the pairs of each group, for each start."""
    summary = []
    for group, start in dict.fromkeys((row["group"], row["start"]) for row in rows):
        some = [row for row in rows if (row["group"], row["start"]) == (group, start)]
        entry: dict[str, Any] = {
            "group": group, "start": start, "pairs": len(some), "truth": some[0]["truth"],
            "motion_px": float(np.mean([row["motion_px"] for row in some])),
            "settled": _settled([row["settled"] for row in some]),
            "error_px": {
                mark: float(np.mean([row["error_px"][mark] for row in some])) for mark in some[0]["error_px"]
            },
        }  # fmt: skip
        if "update_px" in some[0]:
            entry |= {
                "start_ms": _median(row["start_ms"] for row in some),
                "iteration_ms": _median(row["iteration_ms"] for row in some),
                "to_px": {
                    what: {f"{bound:g}": _reached(rows, some, what, bound) for bound in bounds} for what in REACHED
                },
                "distance_px": {
                    mark: {
                        name: _median(row[key][mark] for row in some)
                        for name, key in (
                            ("rms", "distance_rms_px"), ("median", "distance_median_px"), ("beyond", "share_beyond"),
                        )
                    }
                    for mark in some[0]["error_px"]
                },
            }  # fmt: skip
        summary.append(entry)
    return summary


def _median(values: Any) -> float:
    return float(np.median(list(values)))


def _settled(settled: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "update_px": np.median([s["update_px"] for s in settled], 0).tolist(),
        "apart_rms_px": _median(s["apart_rms_px"] for s in settled),
        "apart_median_px": _median(s["apart_median_px"] for s in settled),
        "error_px": float(np.mean([s["error_px"] for s in settled])),
    }


def _reached(
    rows: Sequence[dict[str, Any]], some: Sequence[dict[str, Any]], what: str, bound: float
) -> dict[str, float | int]:
    """Iterations and time to a bound, how many pairs got there, and the ratios to the iterations of cold starts.

    Ratios are medians over the pairs in which either start got there. A cold start that did not counts as if it had
    with its last iteration: the ratio is then at most so much.
    """
    counts = [iterations_to(row, what, bound) for row in some]
    times = [row["start_ms"] + n * row["iteration_ms"] for row, n in zip(some, counts, strict=True)]
    entry: dict[str, float | int] = {
        "iterations": _median(counts), "ms": _median(times), "pairs": int(np.isfinite(counts).sum()),
    }  # fmt: skip
    for cold in COLD:
        cold_rows = {row["pair"]: row for row in rows if (row["group"], row["start"]) == (some[0]["group"], cold)}
        ratios = []
        for row, n in zip(some, counts, strict=True):
            cold_n = iterations_to(cold_rows[row["pair"]], what, bound)
            if np.isfinite(min(n, cold_n)):
                ratios.append(n / max(1.0, min(cold_n, len(row["update_px"]))))
        entry[f"to_{cold}"] = _median(ratios) if ratios else float("nan")
    return entry


def cut_problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Pairs right behind a cut that the estimator solved worse than from a cold start, with as many iterations."""
    problems = []
    behind = [row for row in rows if row["group"] == CUTS]
    cold = {row["pair"]: row["error_px"] for row in behind if row["start"] == "coarse"}
    for row in behind:
        if row["start"] == "stream":
            for mark, error in row["error_px"].items():
                if error > cold[row["pair"]][mark] + SLACK_PX:
                    problems.append(
                        f"{row['pair']}, behind a cut ({'noticed' if row['noticed'] else 'not noticed'}): error "
                        f"{error:.2f} px after {mark} iterations, {cold[row['pair']][mark]:.2f} px from a cold start"
                    )
    return problems


def print_tables(
    summary: Sequence[dict[str, Any]], problems: Sequence[str], bounds: Sequence[float], console: Console
) -> None:
    """Iterations to each bound, distances, errors, what the settled states are worth, and what is wrong."""
    curves = [row for row in summary if "to_px" in row]
    for bound in bounds:
        console.print(_reached_table(curves, f"{bound:g}"))
    console.print(_distance_table(curves, bounds[0]))
    console.print(_error_table(summary))
    for group, row in {row["group"]: row for row in curves}.items():
        settled, updates = row["settled"], row["settled"]["update_px"]
        console.print(
            f"{group}: motion {row['motion_px']:.1f} px; settled states: update {updates[0]:.3f} (from coarse), "
            f"{updates[1]:.3f} px (from full, warped), apart {settled['apart_rms_px']:.3f} px RMS, "
            f"{settled['apart_median_px']:.3f} px median",
            highlight=False,
        )
    for problem in problems:
        console.print(f"worse than cold: {problem}", style="red", markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("sequence (pairs)", "start"):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _fill(table: Table, rows: Sequence[dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]) -> Table:
    for before, row in zip((None, *rows), rows, strict=False):
        begins = before is None or before["group"] != row["group"]
        if begins and before is not None:
            table.add_section()
        label = f"{row['group']} ({row['pairs']})" if begins else ""
        table.add_row(label, row["start"], *(text.replace("inf", "-").replace("nan", "-") for text in cells(row)))
    return table


def _reached_table(rows: Sequence[dict[str, Any]], bound: str) -> Table:
    columns = [*REACHED, "/ zero", "/ coarse", "ms", "ms, start", "ms / it."]
    title = (
        f"iterations to {bound} px, median (how many pairs got there): RMS update, RMS and median distance; for the "
        "update, ratios to cold starts, and time"
    )
    table = _table(title, *columns)

    def cells(row: dict[str, Any]) -> list[str]:
        to = {what: entries[bound] for what, entries in row["to_px"].items()}
        return [
            *(f"{entry['iterations']:g} ({entry['pairs']})" for entry in to.values()),
            *(f"{to['update'][f'to_{cold}']:.2f}" for cold in COLD),
            f"{to['update']['ms']:.0f}", f"{row['start_ms']:.1f}", f"{row['iteration_ms']:.1f}",
        ]  # fmt: skip

    return _fill(table, rows, cells)


def _distance_table(rows: Sequence[dict[str, Any]], bound: float) -> Table:
    marks = list(rows[0]["distance_px"])
    title = f"distance after so many iterations, px: RMS / median (% beyond {bound:g} px); medians over the pairs"
    table = _table(title, *(str(mark) for mark in marks))

    def cells(row: dict[str, Any]) -> list[str]:
        some = row["distance_px"].values()
        return [f"{d['rms']:.2f} / {d['median']:.2f} ({100 * d['beyond']:.0f})" for d in some]

    return _fill(table, rows, cells)


def _error_table(rows: Sequence[dict[str, Any]]) -> Table:
    marks = list(rows[0]["error_px"])
    table = _table(
        "error after so many iterations, px, mean over the pairs; *: against the settled state, there is no truth",
        *(str(mark) for mark in marks), "settled",
    )  # fmt: skip

    def cells(row: dict[str, Any]) -> list[str]:
        star = "" if row["truth"] else " *"
        errors = [f"{row['error_px'][mark]:.2f}{star}" if mark in row["error_px"] else "" for mark in marks]
        return [*errors, f"{row['settled']['error_px']:.2f}" if row["truth"] else ""]

    return _fill(table, rows, cells)


def plot(rows: Sequence[dict[str, Any]], bound: float, path: Path) -> None:
    """Distance above, error below, against iterations; a column for each group, medians and means over its pairs."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.3 * len(groups) + 0.6, 5.2), layout="constrained")
        panels = figure.subplots(2, len(groups), squeeze=False, sharex=True)
        for (distances, errors), group in zip(panels.T, groups, strict=True):
            _plot_group(distances, errors, [row for row in rows if row["group"] == group])
            distances.axhline(bound, color="#c53030", linewidth=0.8, linestyle="--")
            distances.set_title(group)
            errors.set_xlabel("iterations")
        panels[0][0].set_ylabel("distance, RMS px")
        panels[1][0].set_ylabel("error, px")
        names = errors.get_legend_handles_labels()
        figure.legend(*names, frameon=False, loc="outside lower center", ncols=len(COLOURS))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _plot_group(distances: Axes, errors: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for start, colour in COLOURS.items():
        some = [row for row in rows if row["start"] == start]
        if curves := [row["distance_rms_px"] for row in some if "distance_rms_px" in row]:
            distances.semilogy(np.median(curves, 0), color=colour)
        marks = list(some[0]["error_px"])
        means = [np.mean([row["error_px"][mark] for row in some]) for mark in marks]
        errors.plot(marks, means, color=colour, marker=".", label=start)
    errors.set_yscale("log")
    errors.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (distances, errors):
        axes.grid(color="#e2e8f0")
