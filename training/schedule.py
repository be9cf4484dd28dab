# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a function of the step, so that a run resumes at any step without stored state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """How many steps, and at what rate.

    :ivar kind: "constant": the rate rises for `warmup` steps, then stays, then falls to zero over `cooldown` steps. The
        cool-down branches off: the constant-rate checkpoint stays as it is, so that the run can be continued any number
        of times and cooled down whenever weights are wanted. "one-cycle": up and down in straight lines over all
        `steps` (Smith and Topin, arXiv 1708.07120), as RAFT trains (arXiv 2003.12039).
    :ivar steps: all of a one-cycle run; those before the cool-down of a constant one.
    :ivar rate: the largest learning rate.
    :ivar warmup: steps of rising rate, "constant" only.
    :ivar cooldown: steps of falling rate after `steps`, "constant" only.
    :ivar rise: share of the steps in which the rate rises, "one-cycle" only.
    """

    kind: Literal["constant", "one-cycle"] = "constant"
    steps: int = 20_000
    rate: float = 5e-4
    warmup: int = 200
    cooldown: int = 0
    rise: float = 0.05

    def __post_init__(self) -> None:
        for name, value, ok, expected in (
            ("steps", self.steps, self.steps >= 1, "at least 1"),
            ("rate", self.rate, 0 < self.rate < 1, "between 0 and 1"),
            ("warmup", self.warmup, self.warmup >= 0, "at least 0"),
            ("cooldown", self.cooldown, self.cooldown >= 0, "at least 0"),
            ("rise", self.rise, 0 < self.rise < 1, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"schedule.{name}: expected {expected}, got {value}")
        if self.kind == "one-cycle" and self.cooldown:
            raise ValueError(f"schedule.cooldown: a one-cycle schedule has none, got {self.cooldown}")

    @property
    def total(self) -> int:
        """All steps."""
        return self.steps + self.cooldown

    def rate_at(self, step: int) -> float:
        """Rate of the step that begins at `step`, counted from 0."""
        if self.kind == "one-cycle":
            # The end points of PyTorch's OneCycleLR by default: rate / 25 at the start, 1e-4 of that at the end.
            first = self.rate / 25
            peak = max(self.rise * self.steps - 1, 0.0)
            return float(np.interp(step, (0, peak, self.steps - 1), (first, self.rate, first * 1e-4)))
        if step >= self.steps:
            return self.rate * max(0.0, 1 - (step - self.steps) / max(self.cooldown, 1))
        return self.rate * min(1.0, (step + 1) / max(self.warmup, 1))

    def checkpoint_name(self, step: int) -> str:
        """The file that holds the state after `step` steps."""
        if self.kind == "one-cycle":
            return "one_cycle.pt"
        return "constant.pt" if step <= self.steps else "cooldown.pt"
