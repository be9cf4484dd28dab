# SPDX-License-Identifier: Apache-2.0
"""The time that deadlines and latencies are measured by: the machine's own, or that of a simulation.

A simulation can be repeated: it computes the real flow, but the time of its stages is drawn from measured times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from deq_flow_ros.streaming.costs import ITERATION, REENCODE, REENCODE_PARTS, SOLVE, StageTimes

OVERHEAD = "overhead"
"""A cost that is no stage: what no stage measures."""


class Clock:
    """The machine's own time."""

    now_ns = staticmethod(time.monotonic_ns)
    """Time that never goes back, ns."""

    def stages(self, device: torch.device) -> StageTimes:
        """Times the stages of work of a device."""

        def recorded() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            return event

        return StageTimes(recorded if device.type == "cuda" else None)


MACHINE = Clock()


@dataclass(frozen=True)
class CostTable:
    """Measured times of the stages, several of each, in ms: by the number of pixels processed, then by stage."""

    stages: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> CostTable:
        """:raises ValueError: if it is not what ``plain`` gave."""
        try:
            stages = {
                int(pixels): {str(name): [float(value) for value in values] for name, values in known.items()}
                for pixels, known in plain["stage_ms_by_pixels"].items()
            }
            if min(min(values) for known in stages.values() for values in known.values()) < 0:
                raise ValueError("times below 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"expected a table of costs as metrics.json holds it, got another: {error!r}") from error
        return cls(stages)

    def plain(self) -> dict[str, Any]:
        """For a JSON file; ``of`` reads it."""
        by_pixels = {
            str(pixels): {name: [round(value, 4) for value in values] for name, values in known.items()}
            for pixels, known in sorted(self.stages.items())
        }
        return {"stage_ms_by_pixels": by_pixels}

    def times(self, name: str, pixels: int) -> list[float]:
        """Times of a stage for so many pixels; empty for a stage that was not measured at all.

        Where it was measured for other numbers of pixels only, they are those of the nearest, in proportion (of the
        correlation of all pairs, in proportion to the square).
        """
        known = [measured for measured, stages in self.stages.items() if name in stages]
        if not known:
            return []
        nearest = min(known, key=lambda measured: abs(measured - pixels))
        ratio = (pixels / nearest) ** (2 if name == "correlate" else 1)
        return [ratio * value for value in self.stages[nearest][name]]


class VirtualClock(Clock):
    """Time that passes only by the costs of a table, which are drawn from it in a fixed random sequence."""

    def __init__(self, costs: CostTable) -> None:
        self._costs = costs
        self._random = np.random.default_rng(0)
        self._now_ns = 0

    def now_ns(self) -> int:
        return self._now_ns

    def stages(self, device: torch.device) -> StageTimes:
        return _ChargedStages(self)

    def wait_until(self, time_ns: int) -> None:
        """Let time pass until then; none passes if that is over."""
        self._now_ns = max(self._now_ns, time_ns)

    def charge(self, name: str, pixels: int) -> None:
        """Let the time of a stage pass."""
        times = self._costs.times(name, pixels)
        if times:
            self._now_ns += round(1e6 * times[self._random.integers(len(times))])


class _ChargedStages(StageTimes):
    """Stages whose times are those that the clock charges. The stage "solve" takes what its iterations take."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        super().__init__()

    def begin(self, pixels: int) -> None:
        self._pixels = pixels
        super().begin(pixels)

    def lap(self, name: str) -> None:
        if name != SOLVE:
            for part in REENCODE_PARTS if name == REENCODE else (name,):
                self._clock.charge(part, self._pixels)
        super().lap(name)

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def charged(*arguments: Any) -> Any:
            result = function(*arguments)
            self._clock.charge(ITERATION, self._pixels)
            return result

        return charged

    def _mark(self) -> int:
        return self._clock.now_ns()
