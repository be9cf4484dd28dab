# SPDX-License-Identifier: Apache-2.0
"""Images so large that all pairs of their cells would not fit: what they take, and where it ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.memory import peak_bytes
from deq_flow_ros.model import SIZES, DEQFlow, deq_flow
from deq_flow_ros.streaming import FlowEstimator


@pytest.fixture(scope="module")
def nano() -> DEQFlow:
    torch.manual_seed(0)
    return DEQFlow("nano").eval()


def test_memory_of_inference_grows_with_the_pixels(nano: DEQFlow) -> None:
    """Why: a camera of 1920x1080 has 7 times the pixels of one of 640x480; of its square a robot has no memory."""

    def peak(height: int, width: int) -> int:
        image = 255 * torch.rand(1, 3, height, width)
        return peak_bytes(lambda: nano(image, image, max_iterations=2), torch.device("cpu"))

    assert peak(384, 512) < 4.4 * peak(192, 256)


def test_a_stream_keeps_to_the_pixels_that_its_model_allows(nano: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: beyond them memory runs out; global aggregation needs all pairs of cells, so it has less room."""
    gma = DEQFlow(replace(SIZES["nano"], update="gma"))
    assert gma.max_pixels < 1920 * 1080 <= nano.max_pixels
    monkeypatch.setattr(deq_flow, "MAX_PIXELS", 64 * 96)
    estimator = FlowEstimator(nano, latency_budget_ms=None, max_iterations=1)
    for stamp_ns in (0, 1):
        result = estimator.update(np.tile(np.arange(192, dtype=np.uint8)[None, :, None], (128, 1, 3)), stamp_ns)
    assert result is not None and result.info.scale == pytest.approx(0.5) and result.flow.shape == (128, 192, 2)
