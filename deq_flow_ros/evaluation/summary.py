# SPDX-License-Identifier: Apache-2.0
"""The figures of a run: what `metrics.json` holds, and what the report shows of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros.evaluation import provenance
from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.results import DROPPED, FIRST, PROCESSED, STAGES, Results, Series, write_text

VERSION = 2
"""Of the layout of `metrics.json`; it grows when a key changes its meaning or goes."""
MODES = {
    "offline": "every frame, one after the other",
    "realtime": "as on the robot, simulated from measured costs",
    "live": "through the node over DDS",
}
BY_THE_CLOCK = "budgets are kept by this machine's clock, so that another run gives other figures"
"""Of a run over every frame with a budget; simulated, it can be repeated."""
COMPARED = ("latency_ms", "iterations", "residual_px")
"""What settings are compared by, beside the measures."""


class Shares:
    """Where the time of a run goes: `with shares.of("reading"): ...`, and the rest is "other"."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what happens inside under this name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._began

    def shares(self) -> dict[str, float]:
        """Of the time so far, 0..1 each."""
        whole = max(self.seconds, 1e-9)
        named = {name: spent / whole for name, spent in self._spent.items()}
        return named | {"other": max(0.0, 1.0 - sum(named.values()))}


@dataclass
class RunInfo:
    """A run as a whole.

    :ivar mode: "offline", "realtime" or "live".
    :ivar input: what was read, plain values: `description`, `path`, `sha256`, and whatever else there is to say.
    :ivar seconds: how long it took.
    :ivar played_s: how long the stream lasted as it was played, where frames came at their own pace; else None.
    :ivar shares: of the time, by what it was spent on (`Shares.shares`).
    :ivar costs: the cost table of a simulation.
    :ivar problems: what is wrong with the run or its input, a sentence each. A run without any is a good one.
    :ivar transport: of a live run, how many frames were `published` and `received`, and how many fields `recorded`.
    :ivar complete: False where it was interrupted.
    :ivar threads: of PyTorch, where the flow was computed.
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


def summarise(results: Sequence[Results], run: RunInfo) -> dict[str, Any]:
    """The content of `metrics.json`, as docs/evaluate_bag.md describes it; the first setting is the main one."""
    series = [result.series() for result in results]
    return {
        "version": VERSION,
        "mode": run.mode,
        "complete": run.complete,
        "input": run.input,
        "settings": [
            {
                "name": result.name,
                "setting": result.values(),
                **_figures(columns, run, bool(result.values().get("budget_ms"))),
            }
            for result, columns in zip(results, series, strict=True)
        ],
        "comparison": _compare([result.name for result in results], series),
        "problems": run.problems,
        "transport": run.transport,
        "run": {
            "seconds": run.seconds,
            "played_seconds": run.played_s,
            "time_shares": run.shares,
            "peak_memory_mb": provenance.peak_memory_mb(),
            "machine": provenance.machine(),
            "threads": run.threads,
            "environment": provenance.environment(),
            "versions": provenance.versions(),
            "costs": run.costs,
        },
    }


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write `metrics.json`. Raises `MediaError` where that is not possible."""
    write_text(path, json.dumps(_finite(metrics), indent=1, allow_nan=False) + "\n")


def spread(values: np.ndarray) -> dict[str, float | None]:
    """Mean, median, 95th and 99th percentile and maximum of the finite values; None where there is none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return dict.fromkeys(("mean", "median", "p95", "p99", "max"))
    median, p95, p99 = np.percentile(finite, (50, 95, 99))
    figures = {"mean": finite.mean(), "median": median, "p95": p95, "p99": p99, "max": finite.max()}
    return {name: float(value) for name, value in figures.items()}


def _figures(series: Series, run: RunInfo, limited: bool) -> dict[str, Any]:
    processed = series.outcome(PROCESSED)

    def column(name: str) -> np.ndarray:
        return series.number(name)[processed]

    latency = column("latency_ms")
    if run.played_s is not None:
        per_second = float(processed.sum()) / run.played_s if run.played_s > 0 else None
    else:
        per_second = 1e3 / mean if (mean := spread(latency)["mean"]) else None
    stages = {stage: spread(column(f"stage_{stage}_ms")) for stage in STAGES}
    measures = {name: (column(name), spread(column(name))) for name in MEASURES}
    return {
        "frames": {
            "all": len(series),
            **{outcome: int(series.outcome(outcome).sum()) for outcome in (PROCESSED, FIRST, DROPPED)},
            "first_reasons": series.count("reason", FIRST),
            "drop_reasons": series.count("reason", DROPPED),
        },
        "fields_per_second": per_second,
        "latency_ms": spread(latency),
        "deadline_miss_share": _share(column("over_budget")) if limited else None,
        "warm_share": _share(column("warm")),
        "resets": series.count("reset_reason", PROCESSED),
        "iterations": spread(column("iterations")),
        "stop_reasons": series.count("stop_reason", PROCESSED),
        "residual_px": spread(column("residual_px")),
        "scale": spread(column("scale")),
        "stage_ms": {name: figures for name, figures in stages.items() if figures["mean"] is not None},
        "measures": {
            name: {"pairs": int(np.isfinite(values).sum()), **figures}
            for name, (values, figures) in measures.items()
            if figures["mean"] is not None
        },
    }


def _share(flags: np.ndarray) -> float | None:
    return float(np.nanmean(flags)) if np.isfinite(flags).any() else None


def _compare(names: Sequence[str], series: Sequence[Series]) -> dict[str, Any]:
    """Means over the pairs that all settings processed; of each value, over those where all of them know it."""
    # A pair is two frames: where frames are dropped, the same later one may have different ones before it.
    rows_of = []
    for columns in series:
        pairs = list(zip(columns.index.tolist(), columns.previous_stamp_ns.tolist(), strict=True))
        rows_of.append({pairs[row]: row for row in np.flatnonzero(columns.outcome(PROCESSED))})
    common = sorted(reduce(and_, (set(rows) for rows in rows_of)))
    rows = [np.array([own[pair] for pair in common], int) for own in rows_of]
    means: dict[str, dict[str, float]] = {name: {} for name in names}
    for column in (*COMPARED, *MEASURES):
        values = np.array([columns.number(column)[chosen] for columns, chosen in zip(series, rows, strict=True)])
        # A classical method has no iterations at all, which must not take them from the others.
        known = np.isfinite(values).any(axis=1)
        shared = np.isfinite(values[known]).all(axis=0)
        if known.any() and shared.any():
            for name, own, there in zip(names, values, known, strict=True):
                if there:
                    means[name][column] = float(own[shared].mean())
    return {"pairs": len(common), "means": means}


def _finite(value: Any) -> Any:
    """Plain values; what is infinite or NaN becomes null, which JSON can say."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
