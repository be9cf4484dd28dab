# SPDX-License-Identifier: Apache-2.0
"""What a soak run found, camera by camera, and whether it keeps the bounds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rclpy.serialization import deserialize_message
from rich.console import Console
from rich.table import Table
from sensor_msgs.msg import Image
from soak_faults import RECOVERY_S
from soak_parts import PHASE_S, PHASES, half, read_stamp

from deq_flow_ros.recordings.bags import FrameReport, take_account
from deq_flow_ros.ros.accounts import BY_DESIGN, kind_of

LOOK_EVERY = 25
"""One flow field in so many is decoded and looked at."""
MAX_MISSES, MAX_MISSES_BESIDE_A_NEIGHBOUR = 0.01, 0.05
MAX_MEMORY_SPREAD = 0.02
MAX_OVERHEAD_MS = 8.0
MAX_FIELDS_LOST = 0.2
"""Part of its fields that a camera may lose while another one misbehaves."""
SETTLED_S = 1.5
NODE_STAGES = ("wait", "convert", "publish")


@dataclass
class Camera:
    """A camera of the run, and what was heard of it."""

    name: str
    size: tuple[int, int]
    rate: float
    misbehaves: bool = False
    faulty: bool = False
    reports: list[FrameReport] = field(default_factory=list)
    flow_ns: dict[int, int] = field(default_factory=dict)  # stamp: when it came, `time.monotonic_ns`
    flow_stamps: list[int] = field(default_factory=list)
    published_ns: dict[int, int] = field(default_factory=dict)  # stamp: when it went out
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of its process."""
        return self.name or "camera"

    @property
    def input(self) -> str:
        """Its topic."""
        return f"/{self.label}/image_raw"

    @property
    def prefix(self) -> str:
        """Of its topics at the node."""
        return f"{self.name}/" if self.name else ""

    def take_flow(self, data: bytes) -> None:
        """A flow field as it came, not decoded."""
        now_ns, stamp_ns = time.monotonic_ns(), read_stamp(data)
        self.flow_ns[stamp_ns] = now_ns
        self.flow_stamps.append(stamp_ns)
        if len(self.flow_stamps) % LOOK_EVERY == 1:
            message = deserialize_message(data, Image)
            flow = np.frombuffer(message.data, np.float32)
            size, sizes = (message.width, message.height), [self.size]
            if self.misbehaves or self.faulty:
                sizes.append(half(self.size))
            if message.encoding != "32FC2" or size not in sizes:
                self.problems.append(f"flow is {message.encoding} {message.width}x{message.height}")
            elif flow.size != 2 * size[0] * size[1] or not np.isfinite(flow).all():
                self.problems.append(f"flow stamped {stamp_ns} has {flow.size} values, {np.isnan(flow).sum()} NaN")


@dataclass
class Relay:
    """What was heard of the node that computes nothing: what the middleware and rclpy cost any node in Python."""

    flow_ns: dict[int, int] = field(default_factory=dict)
    published_ns: dict[int, int] = field(default_factory=dict)

    def take(self, data: bytes) -> None:
        """A field as it came, not decoded."""
        now_ns = time.monotonic_ns()
        self.flow_ns[read_stamp(data)] = now_ns

    def timing(self, warm_up_s: float) -> dict[str, float]:
        """Percentiles of the time in ms from an image's going out to its field's coming in."""
        begin_ns = min(self.published_ns) + round(1e9 * warm_up_s)
        times = [
            (self.flow_ns[stamp] - out_ns) * 1e-6
            for stamp, out_ns in self.published_ns.items()
            if stamp >= begin_ns and stamp in self.flow_ns
        ]
        return _percentiles(np.array(times)) if times else {}


def beside_the_misbehaving(cameras: Sequence[Camera]) -> dict[str, dict[str, float]]:
    """Fields per second of each other camera in each phase of the camera that misbehaves; {} where none does.

    The second after a change is left out: that is how long a camera that stopped keeps its share of the budget.
    """
    culprit = next((camera for camera in cameras if camera.misbehaves), None)
    if culprit is None:
        return {}
    begin_ns = min(culprit.published_ns.values())
    end_s = (max(culprit.published_ns.values()) - begin_ns) * 1e-9
    phases = range(int((end_s + 1.0) / PHASE_S))  # a last one that is cut short does not count
    rates: dict[str, dict[str, float]] = {}
    for camera in cameras:
        if camera is culprit:
            continue
        came_s = (np.array(sorted(camera.flow_ns.values())) - begin_ns) * 1e-9
        found: dict[str, list[float]] = {}
        for number in phases:
            first_s, last_s = number * PHASE_S + SETTLED_S, (number + 1) * PHASE_S
            count = np.count_nonzero((came_s >= first_s) & (came_s < last_s))
            found.setdefault(PHASES[number % len(PHASES)], []).append(count / (last_s - first_s))
        rates[camera.label] = {phase: float(np.mean(values)) for phase, values in found.items()}
    return rates


def accounts(camera: Camera) -> dict[str, Any]:
    """What became of each image; what does not add up stands under "problems".

    An image that the middleware lost on the way cannot have an account of its own, but the node counts it.
    """
    lost = max((int(report.values["frames_lost"]) for report in camera.reports), default=0)
    reported = {report.stamp_ns for report in camera.reports}
    missing = camera.published_ns.keys() - reported
    arrived = [stamp for stamp in camera.published_ns if len(missing) > lost or stamp not in missing]
    account = take_account(arrived, camera.reports, camera.flow_stamps)
    reasons: dict[str, int] = {}
    for reason, count in account.drop_reasons.items():
        kind = reason if reason in BY_DESIGN else kind_of(reason)
        reasons[kind] = reasons.get(kind, 0) + count
    problems = [*camera.problems, *account.problems]
    if not account.outcomes["processed"]:
        problems.append("no flow field came")
    return {
        "misbehaves": camera.misbehaves,
        "published": len(camera.published_ns),
        "processed": account.outcomes["processed"],
        "first": account.outcomes["first"],
        "dropped": account.outcomes["dropped"],
        "dropped_by_reason": reasons,
        "lost_in_the_middleware": lost,
        "problems": problems,
    }


def timing(camera: Camera, warm_up_s: float) -> dict[str, Any]:
    """Times in ms of the fields that came after the warm-up; {} of a camera without any, or one that misbehaves."""
    if camera.misbehaves or not camera.published_ns:
        return {}
    begin_ns = min(camera.published_ns) + round(1e9 * warm_up_s)
    reports = [report for report in camera.reports if report.outcome == "processed" and report.stamp_ns >= begin_ns]
    reports = [report for report in reports if report.flow_stamp_ns in camera.flow_ns]
    reports = [report for report in reports if report.stamp_ns in camera.published_ns]
    if not reports:
        return {}
    parts = [_parts(report, camera) for report in reports]
    latency = np.array([report.number("latency_ms") for report in reports])
    out_ns = camera.published_ns.values()  # the clock of the stamps may have been set
    seconds = (max(out_ns) - min(out_ns)) * 1e-9 - warm_up_s
    return {
        "fields": len(reports),
        "fields_per_second": len(reports) / max(seconds, 1e-3),
        "deadline_misses": float(np.mean([report.flag("over_budget") for report in reports])),
        "latency_ms": _percentiles(latency),
        "total_ms": _percentiles(np.array([part["total"] for part in parts])),
        "overhead_ms": _percentiles(np.array([part["total"] - part["estimator"] for part in parts])),
        "median_by_part_ms": {name: float(np.median([part[name] for part in parts])) for name in parts[0]},
        "iterations": float(np.mean([report.number("iterations") for report in reports])),
        "scale": float(np.mean([report.number("scale") for report in reports])),
        "warm_share": float(np.mean([report.flag("warm") for report in reports])),
        "resets": sum(bool(report.values.get("reset_reason")) for report in reports),
    }


def _parts(report: FrameReport, camera: Camera) -> dict[str, float]:
    """Where the time went between an image's going out and its flow's coming in, in ms."""
    assert report.flow_stamp_ns is not None
    total = (camera.flow_ns[report.flow_stamp_ns] - camera.published_ns[report.stamp_ns]) * 1e-6
    parts = {name: report.number(f"stage_{name}_ms") for name in NODE_STAGES}
    latency = report.number("latency_ms")  # from the arrival at the node to the end of the estimator
    return {
        "total": total,
        **parts,
        "estimator": latency - parts["wait"] - parts["convert"],
        "middleware in": report.number("age_ms"),  # the camera stamps an image when it goes out
        "middleware out": total - report.number("age_ms") - latency - parts["publish"],
    }


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{rank}": float(np.percentile(values, rank)) for rank in (50, 95, 99)} | {"max": float(values.max())}


def memory_of(samples: Sequence[tuple[int, float]], warm_up_s: float) -> dict[str, Any]:
    """MB after the warm-up and its spread, (largest - smallest) / smallest; {} for too short a run.

    Beside these, one value of each minute of the whole run, which shows whether memory grows or has found its level.
    """
    values = [mb for when_ns, mb in samples if when_ns >= samples[0][0] + 1e9 * warm_up_s]
    if len(values) < 2:
        return {}
    return {
        "min_mb": min(values),
        "max_mb": max(values),
        "last_mb": values[-1],
        "spread": (max(values) - min(values)) / min(values),
        "by_minute_mb": [mb for _, mb in samples[::60]],  # there is one a second
    }


def bounds(options: argparse.Namespace, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bound with what was found, and whether it holds."""
    found: list[tuple[str, float, float]] = []
    for name, camera in result["cameras"].items():
        found.append((f"{name}: images that are not accounted for", len(camera["accounts"]["problems"]), 0))
        times = camera["timing"]
        if options.accounts_only or camera["accounts"]["misbehaves"]:
            continue
        found.append((f"{name}: images lost on the way", camera["accounts"]["lost_in_the_middleware"], 0))
        if not times:
            found.append((f"{name}: no flow field after the warm-up", 1, 0))
            continue
        if options.overhead:
            found.append((f"{name}: overhead, median ms", times["overhead_ms"]["p50"], MAX_OVERHEAD_MS))
        else:
            disturbed = options.busy_neighbour or options.faults is not None
            limit = MAX_MISSES_BESIDE_A_NEIGHBOUR if disturbed else MAX_MISSES
            found.append((f"{name}: share of late fields", times["deadline_misses"], limit))
    for name, rates in result["beside_the_misbehaving"].items():
        lost = 1.0 - min(rates.values()) / max(rates[PHASES[0]], 1e-3)
        found.append((f"{name}: share of fields lost to a camera that misbehaves", lost, MAX_FIELDS_LOST))
    if "snapshots" in result:
        snapshots = result["snapshots"]
        found.append(("snapshots on a full disk that were not refused", snapshots["asked"] - snapshots["refused"], 0))
    for kind, seconds in result.get("recovery_s", {}).items():
        found.append((f"{kind}: recovery, s, the slowest of {len(seconds)}", max(seconds), RECOVERY_S))
    if not options.accounts_only and result["memory"]:
        found.append(("memory, spread after warm-up", result["memory"]["spread"], MAX_MEMORY_SPREAD))
    return [{"bound": text, "value": value, "limit": limit, "holds": value <= limit} for text, value, limit in found]


def show(result: dict[str, Any], console: Console) -> None:
    """The result as tables."""
    table = Table(title="flow_node", show_header=True)
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for name, camera in result["cameras"].items():
        table.add_column(name, justify="right")
        for key, value in _flat({**camera["accounts"], **camera["timing"]}).items():
            rows.setdefault(key, []).append(value)
    for key, values in rows.items():
        table.add_row(key, *values)
    console.print(table)
    for name, rates in result["beside_the_misbehaving"].items():
        words = ", ".join(f"{phase} {rate:.1f}" for phase, rate in rates.items())
        console.print(f"fields per second of {name} by what the other camera does: {words}")
    if result["relay_ms"]:
        words = ", ".join(f"{name} {value:.2f}" for name, value in result["relay_ms"].items())
        console.print(f"a node that computes nothing, image out to field in, ms: {words}")
    verdict = Table("bound", "found", "limit", "", title="bounds")
    for line in result["bounds"]:
        verdict.add_row(
            line["bound"], f"{line['value']:.4g}", f"{line['limit']:g}", "ok" if line["holds"] else "BROKEN"
        )
    console.print(verdict)


def _flat(values: dict[str, Any]) -> dict[str, str]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{key} {name}": text for name, text in _flat(value).items()})
        elif isinstance(value, list):
            flat[key] = "\n".join(value)
        else:
            flat[key] = f"{value:.3f}" if isinstance(value, float) else str(value)
    return flat
