# SPDX-License-Identifier: Apache-2.0
"""Summary, tables and plot of ``benchmarks.settle``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from rich.console import Console
from rich.table import Table

COLOURS = {"zero": "#a0aec0", "coarse": "#2f855a", "warm": "#2b6cb0", "random": "#c05621", "noise": "#b83280"}


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each model, case and start: medians over the pairs, and the endpoint error as the mean over the groups."""
    summary = []
    for model, case, start in dict.fromkeys((row["model"], row["case"], row["start"]) for row in rows):
        some = [row for row in rows if (row["model"], row["case"], row["start"]) == (model, case, start)]
        with_truth = [row for row in some if row["epe_px"]]
        summary.append(
            {
                "model": model,
                "case": case,
                "start": start,
                "pairs": len(some),
                "moved_px": float(np.median([row["moved_px"] for row in some])),
                "still": float(np.median([row["still"] for row in some])),
                "end_update_px": float(np.median([row["update_px"][-1] for row in some])),
                "to_coarse_px": float(np.median([_last(row["distance_px"]) for row in some])),
                "apart_px": float(np.median([row["apart_px"] for row in some])),
                "epe_px": {n: _group_mean(with_truth, n) for n in (with_truth[0]["epe_px"] if with_truth else ())},
            }
        )
    return summary


def _last(values: dict[Any, float]) -> float:
    return values[max(values, key=int)]


def _group_mean(rows: Sequence[dict[str, Any]], mark: Any) -> float:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["pair"].split("/", 1)[0], []).append(row["epe_px"][mark])
    return float(np.mean([np.mean(values) for values in groups.values()]))


def print_tables(
    summary: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], early: int, console: Console
) -> None:
    """Each model, case and start, then each pair."""
    marks = next((list(row["epe_px"]) for row in summary if row["epe_px"]), [])
    table = Table(title="from each start, px: medians over the pairs, and endpoint error after so many iterations")
    for column in ("model, case (pairs)", "start"):
        table.add_column(column, no_wrap=True)
    moved = f"moved after {early}"
    for column in (
        moved,
        "still",
        "last update",
        "end to coarse's",
        "ends apart",
        *(f"error {mark}" for mark in marks),
    ):
        table.add_column(column, justify="right")
    for entry in summary:
        figures = [f"{entry[key]:.4f}" for key in ("moved_px", "end_update_px", "to_coarse_px", "apart_px")]
        figures.insert(1, f"{entry['still']:.1%}")
        figures += [f"{error:.3f}" for error in entry["epe_px"].values()]
        table.add_row(f"{entry['model']}, {entry['case']} ({entry['pairs']})", entry["start"], *figures)
    console.print(table)
    table = Table(title="of each pair, px: the largest over its starts but noise; the least of what is still")
    jacobian = any("spectral_radius" in row for row in rows)
    extra = ("spectral radius", "adjoint residual") if jacobian else ()
    for column in ("model", "pair", moved, "still", "last update", "ends apart", *extra):
        table.add_column(column, justify="left" if column in ("model", "pair") else "right", no_wrap=True)
    for model, pair in dict.fromkeys((row["model"], row["pair"]) for row in rows):
        some = [row for row in rows if (row["model"], row["pair"]) == (model, pair) and row["start"] != "noise"]
        largest = [max(row["moved_px"] for row in some), max(row["update_px"][-1] for row in some), some[0]["apart_px"]]
        figures = [f"{figure:.4f}" for figure in largest]
        figures.insert(1, f"{min(row['still'] for row in some):.1%}")
        figures += [f"{row['spectral_radius']:.3f}" for row in some if "spectral_radius" in row]
        figures += [f"{row['adjoint_residual']:.1e}" for row in some if "adjoint_residual" in row]
        table.add_row(model, pair, *figures)
    console.print(table)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A line of panels per model: update, distance to the end and error against iterations, a curve per start.

    Of the pairs of the list; if there are none, of the sequences.
    """
    rows = [row for row in rows if row["case"] == "pairs"] or rows
    models = list(dict.fromkeys(row["model"] for row in rows))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 2.9 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), 3, squeeze=False)
        for line, model in zip(panels, models, strict=True):
            for start, colour in COLOURS.items():
                some = [row for row in rows if (row["model"], row["start"]) == (model, start)]
                updates = np.median([row["update_px"] for row in some], 0)
                line[0].loglog(range(1, len(updates) + 1), updates, color=colour, label=start)
                distances = {int(n): np.median([row["distance_px"][n] for row in some]) for n in some[0]["distance_px"]}
                if start == "coarse":
                    del distances[max(distances)]  # what the others are measured from
                line[1].loglog(list(distances), list(distances.values()), color=colour)
                with_truth = [row for row in some if row["epe_px"]]
                errors = {int(n): _group_mean(with_truth, n) for n in (with_truth[0]["epe_px"] if with_truth else ())}
                line[2].semilogx(list(errors), list(errors.values()), color=colour, marker=".")
            count = len({row["pair"] for row in rows if row["model"] == model})
            line[0].set(ylabel=f"{model}, {count} pairs\npx", title="update, RMS, median")
            line[1].set(title="distance to coarse's end, RMS, median")
            line[2].set(title="endpoint error, mean of the groups", ylim=(0, None))
            for axes in line:
                axes.set(xlabel="iterations", xticks=[1, 3, 6, 12, 24, 48, 96])
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.xaxis.set_minor_locator(NullLocator())
                axes.grid(color="#e2e8f0")
        panels[0][0].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
