# SPDX-License-Identifier: Apache-2.0
"""How often data of a field is copied between host and device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP, FIELDS = 3, 4


class Stream(Protocol):
    """What computes the fields; see ``benchmarks.peers.Method``."""

    def field(self, earlier: np.ndarray, later: np.ndarray, stamp_ns: int) -> np.ndarray | None:
        """The flow of a pair."""

    def prepare(self) -> None:
        """Do the work that is possible before the next image arrives."""


def count_copies(method: Stream, frames: Sequence[np.ndarray], device: torch.device) -> dict[str, float]:
    """The number of copies per field that a CUDA device made, by kind, from the profiler; on any other device, none are
    counted.

    :param frames: at least two frames, of a stream that has already begun.
    """
    if device.type != "cuda":
        return {}
    later_ns, count = 10**12, WARM_UP + FIELDS  # than any that the method has seen, which therefore begins anew

    def fields(numbers: range) -> None:
        for i in numbers:
            method.field(frames[i % 2], frames[1 - i % 2], later_ns + i * 33_000_000)
            method.prepare()
        torch.cuda.synchronize(device)

    fields(range(WARM_UP))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        fields(range(WARM_UP, count))
    kinds: Counter[str] = Counter()
    for event in profiler.key_averages():
        for kind in ("Memcpy HtoD", "Memcpy DtoH", "Memset"):
            if event.key.startswith(kind):
                kinds[kind] += event.count
    return {kind: count / FIELDS for kind, count in sorted(kinds.items())}
