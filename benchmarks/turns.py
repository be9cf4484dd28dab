# SPDX-License-Identifier: Apache-2.0
"""Methods that take turns on the pairs of one stream, and the figures of each afterwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from benchmarks.memory import peak_bytes
from benchmarks.peers import Method
from benchmarks.report import MIB, Row, median
from benchmarks.roofline import synchronize
from benchmarks.sequences import PERIOD_NS

NEAR_PX = 0.1


@dataclass
class Samples:
    """The measurements of one method.

    :ivar latency_ms: the time from an image to its field in ms, by pair.
    :ivar ahead_ms: the time of the work before the next image in ms, by pair.
    :ivar stage_ms: the times of the stages of each field.
    :ivar squares: mean squared distance from the reference of each pair, px^2.
    :ivar medians: median distance from the reference of each pair, px.
    :ivar resets: number of pairs without warm flow, because the stream began anew.
    """

    latency_ms: dict[int, float] = field(default_factory=dict)
    ahead_ms: dict[int, float] = field(default_factory=dict)
    stage_ms: list[dict[str, float]] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    resets: int = 0

    def work_ms(self, pair: int) -> float:
        """The whole time that one field took."""
        return self.latency_ms[pair] + self.ahead_ms[pair]

    @property
    def rms_px(self) -> float:
        """The RMS distance from the reference over all pixels; NaN without a pair to compare."""
        return float(np.sqrt(np.mean(self.squares))) if self.squares else float("nan")


def take_turns(
    methods: Mapping[str, Method],
    frames: Sequence[np.ndarray],
    warm_up: int,
    every: int,
    device: torch.device,
) -> dict[str, Samples]:
    """Let every method compute each pair of frames, (H, W, 3) uint8 RGB. Each time, another method begins.

    :param methods: by name. The last one is the reference for distances.
    :param warm_up: number of pairs at the beginning that do not count, at least 1.
    :param every: streams compute all pairs, other methods only every n-th.
    """
    samples = {name: Samples() for name in methods}
    reference = list(methods)[-1]
    for pair, (earlier, later) in enumerate(pairwise(frames)):
        counted = pair - warm_up
        # The last turn that does not count is everyone's: the first use pays for allocations and kernel choices.
        for_all = counted == -1 or (counted >= 0 and counted % every == 0)
        turns = [name for name, method in methods.items() if for_all or method.is_stream]
        first = pair % len(turns)
        flows: dict[str, np.ndarray] = {}
        for name in turns[first:] + turns[:first]:
            flow, latency_ms, ahead_ms = _one_turn(methods[name], earlier, later, pair * PERIOD_NS, device)
            if counted >= 0 and flow is None:
                samples[name].resets += 1
            elif counted >= 0 and flow is not None:
                flows[name] = flow
                samples[name].latency_ms[pair], samples[name].ahead_ms[pair] = latency_ms, ahead_ms
                samples[name].stage_ms.append(methods[name].stage_ms)
        # Distances of all are of the same pairs: not of one behind a cut, where a stream has no warm flow.
        for name, flow in flows.items() if len(flows) == len(methods) else ():
            squared = np.square(flow - flows[reference]).sum(2)
            samples[name].squares.append(float(squared.mean()))
            samples[name].medians.append(float(np.sqrt(np.median(squared))))
    return samples


def _one_turn(
    method: Method, earlier: np.ndarray, later: np.ndarray, stamp_ns: int, device: torch.device
) -> tuple[np.ndarray | None, float, float]:
    """The field, its latency, and the time of the work after it for the next image, both in ms."""
    synchronize(device)
    began = time.perf_counter()
    flow = method.field(earlier, later, stamp_ns)
    synchronize(device)
    done = time.perf_counter()
    method.prepare()
    synchronize(device)
    return flow, 1e3 * (done - began), 1e3 * (time.perf_counter() - done)


def tensor_mib(method: Method, frames: Sequence[np.ndarray], device: torch.device) -> float:
    """The largest amount of memory in MiB that tensors took during two fields, beyond what they took before."""

    def fields() -> None:
        for number, (earlier, later) in enumerate(pairwise(frames[:3])):
            method.field(earlier, later, number * PERIOD_NS)
            method.prepare()

    return peak_bytes(fields, device) / MIB


def nearest_stream(samples: Mapping[str, Samples], methods: Mapping[str, Method]) -> str:
    """The stream that the other methods are compared with: the shortest one within ``NEAR_PX`` RMS, or else the
    nearest.

    :raises ValueError: if there is no pair of which all methods computed a field.
    """
    streams = {name: some.rms_px for name, some in samples.items() if methods[name].is_stream and some.squares}
    if not streams:
        raise ValueError("no pair can be compared: a stream started anew at each pair that all methods processed")
    near = [name for name, rms_px in streams.items() if rms_px <= NEAR_PX]
    return min(near, key=lambda name: methods[name].iterations) if near else min(streams, key=lambda n: streams[n])


def summarise(samples: Mapping[str, Samples], methods: Mapping[str, Method], ours: str) -> dict[str, Row]:
    """The figures of each method. "by_ours" compares its time with that of the stream ``ours`` on each pair, and is
    the median of these ratios.
    """
    rows, base = {}, samples[ours]
    for name, some in samples.items():
        latency = list(some.latency_ms.values())
        common = [pair for pair in some.latency_ms if pair in base.latency_ms]
        if not common:
            continue
        rows[name] = {
            "latency_ms": {
                "median": median(latency),
                "p95": float(np.percentile(latency, 95)),
                "p99": float(np.percentile(latency, 99)),
            },
            "fields_per_second": 1e3 / float(np.mean([some.work_ms(pair) for pair in some.latency_ms])),
            "work_by_ours": median([some.work_ms(pair) / base.work_ms(pair) for pair in common]),
            "latency_by_ours": median([some.latency_ms[pair] / base.latency_ms[pair] for pair in common]),
            "rms_px": some.rms_px,
            "median_px": median(some.medians) if some.medians else float("nan"),
            "stage_ms": _stages(some, methods[name].iterations),
            "pairs": len(latency),
            "resets": some.resets,
        }
    return rows


def _stages(samples: Samples, iterations: int) -> dict[str, float]:
    """The median time of each stage in ms; for the solve, that of one iteration. "ahead" is the work for the next
    image.
    """
    if not samples.stage_ms[0]:
        return {}
    names = dict.fromkeys(name for stages in samples.stage_ms for name in stages)
    medians = {name: median([stages.get(name, 0.0) for stages in samples.stage_ms]) for name in names}
    medians["iteration"] = medians.pop("solve") / iterations
    known = [sum(stages.values()) for stages in samples.stage_ms]
    medians["rest"] = median(np.array(list(samples.latency_ms.values())) - known)
    medians["ahead"] = median(list(samples.ahead_ms.values()))
    return medians
