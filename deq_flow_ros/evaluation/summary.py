# SPDX-License-Identifier: Apache-2.0
"""The figures of a run: the content of ``metrics.json``, which docs/evaluate_bag.md describes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import pandas as pd

from deq_flow_ros.evaluation.gallery import RANKED_BY
from deq_flow_ros.evaluation.records import DROPPED, FIRST, MEASURES, OUTCOMES, PROCESSED, STAGES, doubtful
from deq_flow_ros.host import environment, machine, peak_memory_mb, versions

VERSION = 2
"""Version of the layout of ``metrics.json``. It increases when a key changes its meaning or is removed."""
COMPARISON = (
    ("latency_ms", "latency, mean", "ms", 1),
    ("iterations", "iterations, mean", "", 1),
    ("residual_px", "residual, mean", "px", 3),
    *((name, measure.title, measure.unit, 3 if measure.unit == "px" else 2) for name, measure in MEASURES.items()),
)
"""(column, title, unit, digits) of each row in the table that compares settings."""
SPREAD = ("mean", "median", "p95", "p99", "max")


class SettingEntry(NamedTuple):
    """A setting in the results: its name, its values for ``metrics.json``, and a description for people."""

    name: str
    values: Mapping[str, Any]
    note: str = ""


@dataclass
class RunInfo:
    """A whole run, as docs/evaluate_bag.md describes the entries of ``metrics.json``.

    :ivar played_s: how long the stream lasted, if frames came at their own pace; else None.
    :ivar shares: shares of the time, from ``TimeShares.shares``.
    """

    mode: str
    input: dict[str, Any]
    seconds: float = 0.0
    played_s: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    costs: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    transport: dict[str, int] | None = None
    complete: bool = True
    threads: int | None = None


def summarise(settings: Sequence[SettingEntry], frames: pd.DataFrame, run: RunInfo) -> dict[str, Any]:
    """Compute the content of ``metrics.json``. Values that are not known are None.

    :param settings: the settings, the main one first.
    :param frames: from ``read_frames``.
    """
    by_setting = {setting.name: frames[frames.setting == setting.name] for setting in settings}
    entries = [
        {"name": one.name, "setting": dict(one.values)}
        | _figures(by_setting[one.name], run.played_s, bool(one.values.get("budget_ms")))
        for one in settings
    ]
    return {
        "version": VERSION,
        "mode": run.mode,
        "complete": run.complete,
        "input": run.input,
        "settings": entries,
        "comparison": _compare(by_setting),
        "problems": [*run.problems, *doubtful(by_setting[settings[0].name])],
        "transport": run.transport,
        "run": {
            "seconds": run.seconds,
            "played_seconds": run.played_s,
            "time_shares": run.shares,
            "peak_memory_mb": peak_memory_mb(),
            "machine": machine(),
            "threads": run.threads,
            "environment": environment(),
            "versions": versions(),
            "costs": run.costs,
        },
    }


def spread(values: pd.Series) -> dict[str, float | None]:
    """Mean, median, 95th and 99th percentile and maximum of the known values; None if there are none."""
    figures = (values.mean(), *values.quantile([0.5, 0.95, 0.99]), values.max())  # which leave out NaN
    return {name: None if pd.isna(figure) else float(figure) for name, figure in zip(SPREAD, figures, strict=True)}


def count_words(frames: pd.DataFrame, column: str, outcome: str) -> dict[str, int]:
    """Count how often each text of a column occurs in the rows of an outcome, the most frequent first.

    Texts that differ only in numbers are counted together, with "…" in place of the numbers.
    """
    words = Counter(frames.loc[(frames.outcome == outcome) & (frames[column] != ""), column])
    kinds: dict[str, list[str]] = {}
    for word in words:
        kinds.setdefault(re.sub(r"-?\d+(\.\d+)?", "…", word), []).append(word)
    counts = Counter({same[0] if len(same) == 1 else kind: sum(words[w] for w in same) for kind, same in kinds.items()})
    return dict(counts.most_common())


def _figures(frames: pd.DataFrame, played_s: float | None, limited: bool) -> dict[str, Any]:
    """Figures of one setting; ``limited`` says whether it has a budget."""
    done = frames[frames.outcome == PROCESSED]
    latency = spread(done.latency_ms)
    per_second = 1e3 / latency["mean"] if latency["mean"] else None
    if played_s is not None:
        per_second = len(done) / played_s if played_s > 0 else None
    stages = {stage: done[f"stage_{stage}_ms"] for stage in STAGES}
    return {
        "frames": {
            "all": len(frames),
            **{outcome: int((frames.outcome == outcome).sum()) for outcome in OUTCOMES},
            "first_reasons": count_words(frames, "reason", FIRST),
            "drop_reasons": count_words(frames, "reason", DROPPED),
        },
        "fields_per_second": per_second,
        "latency_ms": latency,
        "deadline_miss_share": spread(done.over_budget)["mean"] if limited else None,
        "warm_share": spread(done.warm)["mean"],
        "resets": count_words(frames, "reset_reason", PROCESSED),
        "iterations": spread(done.iterations),
        "stop_reasons": count_words(frames, "stop_reason", PROCESSED),
        "residual_px": spread(done.residual_px),
        "scale": spread(done["scale"]),
        "stage_ms": {stage: spread(values) for stage, values in stages.items() if values.notna().any()},
        "measures": {name: {"pairs": n, **spread(done[name])} for name in MEASURES if (n := int(done[name].count()))},
    }


def _compare(by_setting: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Means over the pairs of the same two frames that all settings processed, by column where all know the value."""
    pairs = {
        name: frames[frames.outcome == PROCESSED].set_index(["index", "previous_stamp_ns"])
        for name, frames in by_setting.items()
    }
    common = reduce(pd.Index.intersection, (frames.index for frames in pairs.values())).sort_values()
    means: dict[str, dict[str, float]] = {name: {} for name in pairs}
    for column, *_ in COMPARISON:
        values = pd.DataFrame({name: frames.loc[common, column] for name, frames in pairs.items()})
        # A classical method has no iterations. The column must still be compared for the other settings.
        shared = values.dropna(axis="columns", how="all").dropna()
        for name, mean in shared.mean().items() if len(shared) else ():
            means[str(name)][column] = float(mean)
    return {"pairs": len(common), "means": means}


Metrics = Mapping[str, Any]
"""The result of ``summarise``."""
MODES = {
    "offline": "every frame, one after the other",
    "realtime": "timing as on a robot, simulated from measured costs",
    "live": "through the node over DDS",
}
BY_THE_CLOCK = "budgets are kept by the clock of this machine, so another run gives other figures"
NEITHER_GOOD_NOR_BAD = ("iterations", "residual_px", "photometric_still", "epe_still_px", "static_percent")
"""Figures for which less is not better. A solver that stops early has few iterations and a large residual."""


class Figure(NamedTuple):
    """A figure with its title, its unit, and a note to compare it with."""

    value: str
    title: str
    note: str = ""
    unit: str = ""


class ComparedRow(NamedTuple):
    """A figure for every setting, and the numbers of the settings that are best in it."""

    title: str
    values: list[str]
    best: Collection[int] = frozenset()


def number(value: float | None, digits: int = 2) -> str:
    """A figure with so many digits after the point; a dash if it is not known."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share 0..1 in percent."""
    return "–" if share is None else f"{100 * share:.1f} %"


def counted(frames: Metrics) -> Figure:
    """The numbers of frames by outcome."""
    counts = f"{frames['processed']} with flow, {frames['first']} first, {frames['dropped']} dropped"
    return Figure(str(frames["all"]), "frames", counts)


def error_measure(figures: Metrics) -> str:
    """The measure that says most about the quality of this setting's flow."""
    return next((key for key in RANKED_BY if key in figures["measures"]), "photometric")


def mode(metrics: Metrics) -> str:
    """The mode of the run in words, and if it cannot be repeated, why."""
    limited = any(figures["setting"].get("budget_ms") for figures in metrics["settings"])
    return MODES[metrics["mode"]] + (f"; {BY_THE_CLOCK}" if metrics["mode"] == "offline" and limited else "")


def headline(metrics: Metrics) -> list[Figure]:
    """The figures of the main setting."""
    figures = metrics["settings"][0]
    latency, iterations, residual = figures["latency_ms"], figures["iterations"], figures["residual_px"]
    played = "while the stream was played" if metrics["run"]["played_seconds"] else "from the mean latency"
    tail = f"95 %: {number(latency['p95'], 1)}, 99 %: {number(latency['p99'], 1)}, max: {number(latency['max'], 1)}"
    shown = [
        counted(figures["frames"]),
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
    values = {name: number(mean[name], 3 if mean[name] < 0.1 else 2) for name in shown}
    return [Figure(values[one], MEASURES[one].title, notes.get(one, ""), MEASURES[one].unit) for one in shown]


def comparison(metrics: Metrics) -> list[ComparedRow]:
    """The comparison of settings on the pairs that all of them processed; counts are over all frames."""
    settings, means = metrics["settings"], metrics["comparison"]["means"]
    rows = [ComparedRow("frames with flow", [str(figures["frames"]["processed"]) for figures in settings])]
    if any(figures["setting"].get("budget_ms") for figures in settings):
        rows.append(ComparedRow("late", [percent(figures["deadline_miss_share"]) for figures in settings]))
    solving = {n for n, figures in enumerate(settings) if figures["setting"].get("method", "deq") == "deq"}
    for column, title, unit, digits in COMPARISON:
        known = {n: value for n, one in enumerate(settings) if (value := means[one["name"]].get(column)) is not None}
        if column == "iterations":
            known = {n: value for n, value in known.items() if n in solving}
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
    shown = headline(metrics)
    return [(one.title, f"{one.value} {one.unit}".rstrip() + (f"   ({one.note})" if one.note else "")) for one in shown]
