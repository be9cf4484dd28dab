# SPDX-License-Identifier: Apache-2.0
"""Summary, tables and plot of ``benchmarks.warm_start``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from benchmarks.report import Row, grouped, mean, median, picture, table
from benchmarks.sequences import CUTS, first_below

STREAM = "stream"
COLOURS = {
    "zero": "#a0aec0", "coarse": "#4a5568", "flow": "#f6ad55", "flow, warped": "#c05621", "full": "#63b3ed",
    "full, warped": "#2b6cb0", STREAM: "#2f855a",
}  # fmt: skip
COLD = ("zero", "coarse")
REACHED = {"update": "update_px", "distance": "distance_rms_px"}
SETTLED_PX = 0.02
"""An error counts as settled if it exceeds that of the settled state by no more than this."""
PHASES = ((1, 2), (2, 4), (4, 8), (8, 16))
"""Ranges of iterations over which the mean factor of the update per iteration is reported."""
SLACK_PX = 0.01
"""Allowed difference between two solves of one pair whose images were encoded in different batches; it is due to
rounding alone.
"""


def iterations_to(row: Row, what: str, bound: float) -> float:
    """How many iterations a start needs to reach a bound; 0 if it is below the bound at once, infinite if it never
    gets there.
    """
    values = row[REACHED[what]]
    return first_below(values, bound) - (what != "update")  # a distance has the start's own before those of iterations


def iterations_to_error(row: Row) -> float:
    """How many iterations a start needs to reach the error of the settled state; infinite if it never does."""
    return first_below(row["errors_px"], row["settled"]["error_px"] + SETTLED_PX) - 1


def factors(row: Row) -> list[float]:
    """The factor by which each iteration reduces the update, as the geometric mean within each of ``PHASES``."""
    updates = row["update_px"]
    return [(updates[to - 1] / updates[since - 1]) ** (1 / (to - since)) for since, to in PHASES if to <= len(updates)]


def summarise(rows: Sequence[Row], bounds: Sequence[float]) -> list[Row]:
    """For each group and start, the medians over the pairs; of errors, the means."""
    summary = []
    for (group, start), some in grouped(rows, "group", "start").items():
        settled = [row["settled"] for row in some]
        entry: Row = {
            "group": group, "start": start, "pairs": len(some), "truth": some[0]["truth"],
            "motion_px": mean(row["motion_px"] for row in some),
            "settled": {
                "update_px": np.median([s["update_px"] for s in settled], 0).tolist(),
                "apart_rms_px": median(s["apart_rms_px"] for s in settled),
                "error_px": mean(s["error_px"] for s in settled),
            },
            "error_px": {mark: mean(row["error_px"][mark] for row in some) for mark in some[0]["error_px"]},
        }  # fmt: skip
        if "update_px" in some[0]:
            of_group = [row for row in rows if row["group"] == group]
            distances = np.median([row["distance_rms_px"] for row in some], 0)
            entry |= {
                "start_ms": median(row["start_ms"] for row in some),
                "iteration_ms": median(row["iteration_ms"] for row in some),
                "to_px": {what: {f"{b:g}": _reached(of_group, some, what, b) for b in bounds} for what in REACHED},
                "to_error": _to_error(of_group, some),
                "first_update_px": median(row["update_px"][0] for row in some),
                "factors": np.median([factors(row) for row in some], 0).tolist(),
                "distance_px": {mark: float(distances[mark]) for mark in some[0]["error_px"]},
            }
        summary.append(entry)
    return summary


def _reached(of_group: Sequence[Row], some: Sequence[Row], what: str, bound: float) -> Row:
    """Iterations and time to a bound, how many pairs reached it, and the ratios to the iterations of cold starts.

    Ratios are medians over the pairs in which either start reached the bound. A cold start that did not reach it counts
    as if it had done so with its last iteration. The true ratio is then at most this large.
    """
    counts = [iterations_to(row, what, bound) for row in some]
    times = [row["start_ms"] + n * row["iteration_ms"] for row, n in zip(some, counts, strict=True)]
    entry = {"iterations": median(counts), "ms": median(times), "pairs": int(np.isfinite(counts).sum())}
    for cold in COLD:
        cold_rows = {row["pair"]: row for row in of_group if row["start"] == cold}
        ratios = []
        for row, n in zip(some, counts, strict=True):
            cold_n = iterations_to(cold_rows[row["pair"]], what, bound)
            if np.isfinite(min(n, cold_n)):
                ratios.append(n / max(1.0, min(cold_n, len(row["update_px"]))))
        entry[f"to_{cold}"] = median(ratios) if ratios else float("nan")
    return entry


def _to_error(of_group: Sequence[Row], some: Sequence[Row]) -> Row:
    """Mean iterations and time to the error of the settled state, and their ratios to those of cold starts."""

    def taken(members: Sequence[Row]) -> np.ndarray:
        counts = [min(iterations_to_error(row), len(row["update_px"])) for row in members]
        times = [row["start_ms"] + n * row["iteration_ms"] for row, n in zip(members, counts, strict=True)]
        return np.array([mean(counts), mean(times)])

    entry: Row = {"pairs": sum(np.isfinite(iterations_to_error(row)) for row in some)}
    entry["iterations"], entry["ms"] = of_some = taken(some)
    for cold in COLD:
        of_cold = taken([row for row in of_group if row["start"] == cold])
        entry[f"to_{cold}"], entry[f"ms_to_{cold}"] = of_some / np.maximum(of_cold, 1e-9)
    return {name: float(value) for name, value in entry.items()}


def cut_problems(rows: Sequence[Row]) -> list[str]:
    """Pairs right behind a cut which the estimator solved worse than a cold start with the same number of
    iterations.
    """
    behind = [row for row in rows if row["group"] == CUTS]
    cold = {row["pair"]: row["error_px"] for row in behind if row["start"] == "coarse"}
    return [
        f"{row['pair']}, behind a cut ({'noticed' if row['noticed'] else 'not noticed'}): error {error:.2f} px after "
        f"{mark} iterations, {cold[row['pair']][mark]:.2f} px from a cold start"
        for row in behind
        if row["start"] == STREAM
        for mark, error in row["error_px"].items()
        if error > cold[row["pair"]][mark] + SLACK_PX
    ]


def print_tables(summary: Sequence[Row], bounds: Sequence[float], console: Console) -> None:
    """Print the iterations to each bound, distances, errors, and how good the settled states are."""
    curves = [row for row in summary if "to_px" in row]
    for bound in bounds:
        title = (
            f"iterations to {bound:g} px, median (how many pairs got there): RMS update and distance; for the update, "
            "ratios to cold starts, and time"
        )
        columns = [*REACHED, "/ zero", "/ coarse", "ms", "ms, start", "ms / it."]
        console.print(_filled(title, columns, curves, partial(_reached_cells, bound=f"{bound:g}")))
    title = (
        f"iterations to the settled state's error, within {SETTLED_PX:g} px, mean (how many pairs got there; others "
        "count as if with the last): ratios to cold starts, and time, start included"
    )
    columns = ["iterations", "/ zero", "/ coarse", "ms", "ms / zero", "ms / coarse"]
    console.print(_filled(title, columns, curves, _to_error_cells))
    title = "what an iteration leaves of the update, geometric mean between those iterations; medians over the pairs"
    columns = ["first update, px", *(f"{since} to {to}" for since, to in PHASES)][: 1 + len(curves[0]["factors"])]
    console.print(
        _filled(title, columns, curves, lambda row: [f"{v:.2f}" for v in (row["first_update_px"], *row["factors"])])
    )
    title = "RMS distance after so many iterations, px; medians over the pairs"
    marks = list(curves[0]["distance_px"])
    console.print(_filled(title, marks, curves, lambda row: [f"{row['distance_px'][mark]:.2f}" for mark in marks]))
    title = "mean error in px by iterations; *: distance from the settled state, as there is no true flow"
    console.print(_filled(title, [*marks, "settled"], summary, lambda row: _error_cells(row, marks)))
    for group, (row, *_) in grouped(curves, "group").items():
        settled, updates = row["settled"], row["settled"]["update_px"]
        console.print(
            f"{group}: motion {row['motion_px']:.1f} px; settled states: update {updates[0]:.3f} (from coarse), "
            f"{updates[1]:.3f} px (from full, warped), apart {settled['apart_rms_px']:.3f} px RMS"
        )


def _filled(title: str, columns: Sequence[object], rows: Sequence[Row], cells: Callable[[Row], list[str]]) -> Table:
    """A table with a section for each group."""
    filled = table(title, ["sequence (pairs)", "start"], columns)
    for group, some in grouped(rows, "group").items():
        for place, row in enumerate(some):
            label = "" if place else f"{group} ({row['pairs']})"
            filled.add_row(label, row["start"], *(c.replace("inf", "-").replace("nan", "-") for c in cells(row)))
        filled.add_section()
    return filled


def _reached_cells(row: Row, bound: str) -> list[str]:
    to = {what: entries[bound] for what, entries in row["to_px"].items()}
    return [
        *(f"{entry['iterations']:g} ({entry['pairs']})" for entry in to.values()),
        *(f"{to['update'][f'to_{cold}']:.2f}" for cold in COLD),
        f"{to['update']['ms']:.0f}", f"{row['start_ms']:.1f}", f"{row['iteration_ms']:.1f}",
    ]  # fmt: skip


def _to_error_cells(row: Row) -> list[str]:
    to = row["to_error"]
    ratios = [f"{to[name]:.2f}" for name in ("to_zero", "to_coarse", "ms_to_zero", "ms_to_coarse")]
    return [f"{to['iterations']:.1f} ({to['pairs']:.0f})", *ratios[:2], f"{to['ms']:.0f}", *ratios[2:]]


def _error_cells(row: Row, marks: Sequence[int]) -> list[str]:
    star = "" if row["truth"] else " *"
    errors = [f"{row['error_px'][mark]:.2f}{star}" if mark in row["error_px"] else "" for mark in marks]
    return [*errors, f"{row['settled']['error_px']:.2f}" if row["truth"] else ""]


def plot(rows: Sequence[Row], bound: float, path: Path) -> None:
    """Draw distance (above) and error (below) against iterations: one column per group, medians and means over its
    pairs.
    """
    groups = grouped(rows, "group")
    with picture(path, 2.3 * len(groups) + 0.6, 5.2) as figure:
        panels = figure.subplots(2, len(groups), squeeze=False, sharex=True)
        for (distances, errors), (group, of_group) in zip(panels.T, groups.items(), strict=True):
            _plot_group(distances, errors, of_group)
            distances.axhline(bound, color="#c53030", linewidth=0.8, linestyle="--")
            distances.set_title(group)
            errors.set_xlabel("iterations")
        panels[0][0].set_ylabel("distance, RMS px")
        panels[1][0].set_ylabel("error, px")
        names = errors.get_legend_handles_labels()
        figure.legend(*names, frameon=False, loc="outside lower center", ncols=len(COLOURS))


def _plot_group(distances: Axes, errors: Axes, rows: Sequence[Row]) -> None:
    for start, some in grouped(rows, "start").items():
        if "distance_rms_px" in some[0]:
            distances.semilogy(np.median([row["distance_rms_px"] for row in some], 0), color=COLOURS[start])
        marks = list(some[0]["error_px"])
        means = [mean(row["error_px"][mark] for row in some) for mark in marks]
        errors.plot(marks, means, color=COLOURS[start], marker=".", label=start)
    errors.set_yscale("log")
    errors.xaxis.set_major_locator(MaxNLocator(integer=True))
