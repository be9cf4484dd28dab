# SPDX-License-Identifier: Apache-2.0
"""What tests of streams share: pictures that move, and a clock that only the model's work moves on."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming.clock import MACHINE

PERIOD_NS = 33_000_000


def frames(count: int, height: int = 48, width: int = 64, step: int = 2, seed: int = 0) -> list[np.ndarray]:
    """A window moving over one smooth random picture."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, height // 8 + 2, (width + count * step) // 8 + 2)))
    picture = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 255)[0]
    picture = picture.permute(1, 2, 0).numpy().astype(np.uint8)
    return [np.ascontiguousarray(picture[:height, i * step : i * step + width]) for i in range(count)]


class Clock:
    """Time that passes only when the model works: per image 10 ms for encoding it, 20 ms for each iteration.

    The images of a batch cost as much as one after the other, unless ``per_batch``: then as much as one of them.
    :param per_pixel: the costs are those of 48x64 pixels, and in proportion for others.
    """

    def __init__(
        self, model: DEQFlow, monkeypatch: pytest.MonkeyPatch, per_pixel: bool = False, per_batch: bool = False
    ) -> None:
        self.now_ns = 10**9
        self.encode_ms, self.iteration_ms = 10.0, 20.0
        self._per_pixel, self._per_batch = per_pixel, per_batch
        encode, iterate = model.encode, model.update_block.forward

        def timed_encode(image: torch.Tensor, *arguments: Any) -> Any:
            self._pass(self.encode_ms, image, 48 * 64)
            return encode(image, *arguments)

        def timed_iteration(hidden: torch.Tensor, *arguments: Any) -> Any:
            self._pass(self.iteration_ms, hidden, 6 * 8)
            return iterate(hidden, *arguments)

        monkeypatch.setattr(MACHINE, "now_ns", lambda: self.now_ns)
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)
        monkeypatch.setattr(model, "encode", timed_encode)
        monkeypatch.setattr(model.update_block, "forward", timed_iteration)

    def _pass(self, ms: float, tensor: torch.Tensor, usual: int) -> None:
        batch, _, height, width = tensor.shape
        ms *= height * width / usual if self._per_pixel else 1
        self.now_ns += round(1e6 * ms * (1 if self._per_batch else batch))
