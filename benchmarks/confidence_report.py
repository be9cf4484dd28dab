# SPDX-License-Identifier: Apache-2.0
"""Means, tables and plot of ``benchmarks.confidence``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

COLOURS = {
    "oracle": "#1a202c", "uncertainty": "#2b6cb0", "forward-backward": "#2f855a", "residual": "#c05621",
    "weak gradient": "#a0aec0",
}  # fmt: skip
PAIRS = "pairs"
MIN_SHARE = 0.002
"""Of the pixels, for a bin of the calibration to be shown."""


def means(rows: Sequence[dict[str, Any]], made: Collection[str]) -> dict[str, dict[str, Any]]:
    """By group, and for ``pairs``, the mean over the groups that are not made: what is a mean over pairs."""
    summary = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        some = [row for row in rows if row["group"] == group]
        entry: dict[str, Any] = {"pairs": len(some), "epe_px": float(np.mean([row["epe_px"] for row in some]))}
        if "expected_px" in some[0]:
            entry["expected_px"] = float(np.mean([row["expected_px"] for row in some]))
        for what in ("ause", "curves"):
            entry[what] = {name: np.mean([row[what][name] for row in some], 0).tolist() for name in some[0][what]}
        if "areas" in some[0]:  # medians: one pair whose motion was not found at all would be all that is seen
            entry["areas"] = {
                name: np.median([row["areas"][name] for row in some], 0).tolist() for name in some[0]["areas"]
            }
        summary[group] = entry
    listed = [entry for group, entry in summary.items() if group not in made]
    if listed:
        together: dict[str, Any] = {"pairs": sum(entry["pairs"] for entry in listed)}
        for what in ("epe_px", "expected_px"):
            if what in listed[0]:
                together[what] = float(np.mean([entry[what] for entry in listed]))
        for what in ("ause", "curves"):
            of_groups = [entry[what] for entry in listed]
            together[what] = {name: np.mean([of[name] for of in of_groups], 0).tolist() for name in of_groups[0]}
        summary[PAIRS] = together
    return summary


def calibration(rows: Sequence[dict[str, Any]], made: Collection[str]) -> dict[str, dict[str, list[float]]]:
    """For the listed pairs and for the first kind that is made: mean true by mean expected error in each bin.

    Every pair counts alike, whatever its number of pixels; bins with hardly any pixel are left out.
    """
    kinds = {PAIRS: [row for row in rows if row["group"] not in made]}
    kinds |= {kind: [row for row in rows if row["group"] == kind] for kind in list(made)[:1]}
    curves = {}
    for kind, some in kinds.items():
        if not some or "bins" not in some[0]:
            continue
        share, expected, error = (
            np.mean([row["bins"][name] for row in some], 0) for name in ("share", "expected_px", "error_px")
        )
        shown = share >= MIN_SHARE
        curves[kind] = {
            "share": share[shown].tolist(), "expected_px": (expected[shown] / share[shown]).tolist(),
            "error_px": (error[shown] / share[shown]).tolist(),
        }  # fmt: skip
    return curves


def print_tables(
    rows: Sequence[dict[str, Any]],
    summary: dict[str, dict[str, Any]],
    curve: dict[str, dict[str, list[float]]],
    console: Console,
) -> None:
    """AUSE by group and by pair, what the measures say of a plain area, and the calibration."""
    entries = [*summary.items(), *((row["pair"], row) for row in rows if row["group"] in summary)]
    table = _table("AUSE, over the mean error; 0 is perfect; px: mean error, and the expected one", "pairs")
    columns = list(rows[0]["ause"])
    for column in ("error, px", "expected", *columns):
        table.add_column(column, justify="right")
    for number, (name, entry) in enumerate(entries):
        if number == len(summary):
            table.add_section()
        expected = f"{entry['expected_px']:.2f}" if "expected_px" in entry else "-"
        label = f"{name} ({entry['pairs']})" if "pairs" in entry else name
        table.add_row(label, f"{entry['epe_px']:.2f}", expected, *(f"{entry['ause'][c]:.3f}" for c in columns))
    console.print(table)
    for name, entry in summary.items():
        if "areas" in entry:
            table = _table(f"{name}: mean inside of the area without texture, and outside, median over the pairs", "")
            for column in entry["areas"]:
                table.add_column(column, justify="right")
            for place, where in enumerate(("inside", "outside")):
                table.add_row(where, *(f"{values[place]:.3f}" for values in entry["areas"].values()))
            console.print(table)
    for kind, values in curve.items():
        table = _table(f"calibration, {kind}: true error of the pixels by their expected error, px", "share of pixels")
        table.add_column("expected", justify="right")
        table.add_column("true", justify="right")
        for share, expected, error in zip(*(values[n] for n in ("share", "expected_px", "error_px")), strict=True):
            table.add_row(f"{100 * share:.1f} %", f"{expected:.3f}", f"{error:.3f}")
        console.print(table)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    return table


def plot(
    summary: dict[str, dict[str, Any]], curve: dict[str, dict[str, list[float]]], made: Sequence[str], path: Path
) -> None:
    """Sparsification curves of the pairs and of what is made, and the calibration of both."""
    kinds = [kind for kind in (PAIRS, *made) if kind in summary]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.1 * (len(kinds) + bool(curve)) + 0.4, 3.5), layout="constrained")
        panels = figure.subplots(1, len(kinds) + bool(curve), squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=False):
            for name, colour in COLOURS.items():
                if name in summary[kind]["curves"]:
                    values = summary[kind]["curves"][name]
                    share = np.arange(len(values)) / len(values)
                    axes.plot(100 * share, values, color=colour, label=name, linestyle="--" * (name == "oracle") or "-")
            axes.set_title(kind)
            axes.set_xlabel("pixels taken out, %")
            axes.set_ylim(0, 1.5)
        panels[0].set_ylabel("mean error of those left, 1: of all")
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=5)
        if curve:
            axes = panels[-1]
            for kind, colour in zip(curve, ("#2b6cb0", "#c05621"), strict=False):
                axes.loglog(curve[kind]["expected_px"], curve[kind]["error_px"], color=colour, marker=".", label=kind)
            ends = [
                min(min(c["expected_px"]) for c in curve.values()),
                max(max(c["expected_px"]) for c in curve.values()),
            ]
            axes.loglog(ends, ends, color="#1a202c", linestyle="--", linewidth=0.8)
            axes.set(title="calibration", xlabel="expected error, px", ylabel="true error, px")
            axes.legend(frameon=False)
        for axes in panels:
            axes.grid(color="#e2e8f0")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
