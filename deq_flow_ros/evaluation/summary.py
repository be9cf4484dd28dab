# SPDX-License-Identifier: Apache-2.0
"""The figures of a run: the content of ``metrics.json``, which docs/evaluate_bag.md describes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pandas as pd

from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.records import DROPPED, FIRST, OUTCOMES, PROCESSED, STAGES
from deq_flow_ros.host import environment, machine, peak_memory_mb, versions

VERSION = 2
"""Version of the layout of ``metrics.json``. It increases when a key changes its meaning or is removed."""
COMPARED = ("latency_ms", "iterations", "residual_px")
"""Columns that settings are compared by, besides the measures."""
SPREAD = ("mean", "median", "p95", "p99", "max")


@dataclass(frozen=True)
class SettingEntry:
    """A setting in the results: its name, its values for ``metrics.json``, and a description for people."""

    name: str
    values: Mapping[str, Any]
    note: str = ""


@dataclass
class RunInfo:
    """Information on a whole run.

    :ivar mode: "offline", "realtime" or "live".
    :ivar input: the input: ``description``, ``path``, ``sha256``, and other facts.
    :ivar played_s: how long the stream lasted, if frames came at their own pace; else None.
    :ivar shares: shares of the time, from ``TimeShares.shares``.
    :ivar costs: cost tables of a simulation, by setting.
    :ivar problems: problems of the run or its input, one sentence each.
    :ivar transport: in a live run, the numbers of frames ``published`` and ``received``, and of fields ``recorded``.
    :ivar threads: the number of PyTorch's threads that computed the flow.
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
    limited = {setting.name: bool(setting.values.get("budget_ms")) for setting in settings}
    figures = {name: _figures(own, run.played_s, limited[name]) for name, own in by_setting.items()}
    entries = [{"name": one.name, "setting": dict(one.values), **figures[one.name]} for one in settings]
    return {
        "version": VERSION,
        "mode": run.mode,
        "complete": run.complete,
        "input": run.input,
        "settings": entries,
        "comparison": _compare(by_setting),
        "problems": run.problems,
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
    known = values.dropna()
    if known.empty:
        return dict.fromkeys(SPREAD)
    figures = (known.mean(), *known.quantile([0.5, 0.95, 0.99]), known.max())
    return dict(zip(SPREAD, map(float, figures), strict=True))


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
    known = {name: done[name].dropna() for name in MEASURES}
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
        "measures": {name: {"pairs": len(values), **spread(values)} for name, values in known.items() if len(values)},
    }


def _compare(by_setting: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Means over the pairs that all settings processed. Each column uses the pairs for which all settings know it."""
    # A pair is identified by both frames, because after dropped frames the earlier one may differ.
    pairs = {
        name: frames[frames.outcome == PROCESSED].set_index(["index", "previous_stamp_ns"])
        for name, frames in by_setting.items()
    }
    common = reduce(pd.Index.intersection, (frames.index for frames in pairs.values())).sort_values()
    means: dict[str, dict[str, float]] = {name: {} for name in pairs}
    for column in (*COMPARED, *MEASURES):
        values = pd.DataFrame({name: frames.loc[common, column] for name, frames in pairs.items()})
        # A classical method has no iterations. The column must still be compared for the other settings.
        shared = values.dropna(axis="columns", how="all").dropna()
        if len(shared):
            for name, mean in shared.mean().items():
                means[str(name)][column] = float(mean)
    return {"pairs": len(common), "means": means}
