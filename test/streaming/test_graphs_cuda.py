# SPDX-License-Identifier: Apache-2.0
"""The engine of captured graphs on a card; ``test_graphs.py`` has what needs none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from streams import PERIOD_NS, frames

from deq_flow_ros.imaging.pictures import TABLE_RADIUS, color_table, flow_to_color
from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.model.cells import carry
from deq_flow_ros.streaming import (
    EagerEngine,
    FlowEstimator,
    FlowResult,
    UpdateRequest,
    choose_runtime,
    update_together,
)
from deq_flow_ros.streaming.graph_engine import GraphEngine
from deq_flow_ros.streaming.interface import Palette

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZE = (96, 128)
COMPILED = [False, True]


@pytest.fixture(scope="module")
def model() -> DEQFlow:
    return load_model("nano", "cuda")


def make_engine(model: DEQFlow, compiled: bool, batch: int = 1, size: tuple[int, int] = SIZE) -> GraphEngine:
    if compiled and choose_runtime("auto", "cuda")[0] != "compiled":
        pytest.skip(choose_runtime("auto", "cuda")[1])
    engine = GraphEngine(model, compiled=compiled)
    engine.make_ready(size, size, batch)
    assert engine.about == ("compiled graphs" if compiled else "graphs") + " of 1 size(s)"
    return engine


def stream(engine: EagerEngine, images: list[np.ndarray], **settings: Any) -> list[FlowResult]:
    estimator = FlowEstimator(engine, **{"max_iterations": 3, "tolerance_px": None, **settings})
    results = []
    for i, image in enumerate(images):
        results.append(estimator.update(image, i * PERIOD_NS))
        estimator.prepare()
    return [result for result in results if result is not None]


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("settings", [{}, {"direction": "backward"}, {"tolerance_px": 0.3, "max_iterations": 8}])
def test_graphs_give_the_flow_of_eager_calls(model: DEQFlow, compiled: bool, settings: dict[str, Any]) -> None:
    """Why: a runtime is for speed alone; in float32 no flow may differ by 1e-3 px."""
    images = frames(6, *SIZE, step=3)
    expected = stream(EagerEngine(model), images, **settings)
    engine = make_engine(model, compiled)
    got = stream(engine, images, **settings)
    assert {result.info.runtime for result in got} == {"compiled" if compiled else "graphs"}
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.flow, other.flow, atol=1e-3)
        assert one.info.iterations == other.info.iterations and one.info.stop_reason == other.info.stop_reason
    engine.close()


@pytest.mark.parametrize("compiled", COMPILED)
def test_half_precision_stays_near(compiled: bool) -> None:
    """Why: it is what ``auto`` chooses; on average its flow may differ by 0.02 px."""
    images = frames(6, *SIZE, step=3)
    half = load_model("nano", "cuda", precision="float16")
    engine = make_engine(half, compiled)
    expected = stream(EagerEngine(load_model("nano", "cuda")), images)
    distances = [
        np.linalg.norm(one.flow - other.flow, axis=2).mean()
        for one, other in zip(stream(engine, images), expected, strict=True)
    ]
    assert np.mean(distances) < 0.02
    engine.close()


def test_cameras_are_one_batch(model: DEQFlow) -> None:
    """Why: a batch of one graph has to give each camera what it would have alone."""
    images = [frames(5, *SIZE, seed=seed) for seed in range(3)]
    engine = make_engine(model, False, batch=3)
    estimators = [FlowEstimator(engine, max_iterations=2, tolerance_px=None) for _ in images]
    for i in range(5):
        requests = [UpdateRequest(e, images[k][i], i * PERIOD_NS) for k, e in enumerate(estimators)]
        results = update_together(requests)
    for k, result in enumerate(results):
        assert result is not None and result.info.runtime == "graphs" and result.info.batch_size == 3
        alone = stream(EagerEngine(model), images[k], max_iterations=2)[-1]
        np.testing.assert_allclose(result.flow, alone.flow, atol=1e-3)
    engine.close()


def test_a_solve_never_waits_for_the_device(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: PyTorch raises at any operation in it that synchronizes; with a tolerance and a deadline as well."""
    engine = make_engine(model, False)
    true = engine.solve

    def watched(*arguments: Any) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            true(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine, "solve", watched)
    images = frames(6, *SIZE)
    stream(engine, images, max_iterations=12, tolerance_px=0.1)
    results = stream(engine, images, max_iterations=12, latency_budget_ms=1000.0)
    assert results[-1].info.runtime == "graphs"
    engine.close()


@pytest.mark.parametrize("max_px", [None, 4.0])
def test_colors_are_those_of_the_host(model: DEQFlow, max_px: float | None) -> None:
    """Why: the card paints what it would take the host longer to paint than the card takes for the field. A last bit
    may lead to the next entry of the table."""
    engine = make_engine(model, False)
    results = stream(engine, frames(4, *SIZE, step=3), palette=Palette(color_table(), TABLE_RADIUS, max_px))
    for result in results:
        assert result.colors is not None
        expected = flow_to_color(result.flow, max_px).astype(int)
        assert (result.colors == expected).all(2).mean() > 0.999 and np.abs(result.colors - expected).max() <= 3
    engine.close()


def test_results_stay_as_they_are(model: DEQFlow) -> None:
    """Why: copies run beside the next frames, whose graphs write to the same memory of the card."""
    engine = make_engine(model, False)
    results = stream(engine, frames(12, *SIZE, step=3))
    kept = [result.flow.copy() for result in results]
    torch.cuda.synchronize()
    expected = stream(EagerEngine(model), frames(12, *SIZE, step=3))
    for result, before, other in zip(results, kept, expected, strict=True):
        np.testing.assert_array_equal(result.flow, before)
        np.testing.assert_allclose(before, other.flow, atol=1e-3)
    engine.close()


def test_memory_is_steady_and_given_back(model: DEQFlow) -> None:
    """Why: a robot runs for hours, and configures anew without a restart."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine = make_engine(model, False)
    estimator = FlowEstimator(engine, max_iterations=2)
    host = getattr(torch.cuda, "host_memory_stats", dict)  # since PyTorch 2.6
    images, used, page_locked = frames(10, *SIZE), [], []
    for i in range(200):
        estimator.update(images[abs(9 - i % 18)], i * PERIOD_NS)
        estimator.prepare()
        used.append(torch.cuda.memory_allocated())
        page_locked.append(host().get("num_host_alloc"))
    assert max(used[20:]) == max(used[100:])
    assert page_locked[20] == page_locked[-1], "a result takes the memory of an earlier one"
    engine.close()
    del estimator, engine
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_carrying_in_one_pass_is_carrying_in_four() -> None:
    """Why: a GPU adds all shares of a cell at once, in no fixed order."""
    generator = torch.Generator().manual_seed(0)
    hidden, flow = torch.randn(2, 64, 15, 20, generator=generator), 3 * torch.randn(2, 2, 15, 20, generator=generator)
    for direction in ("forward", "backward"):
        expected = carry((hidden, flow), direction)
        got = carry((hidden.cuda(), flow.cuda()), direction)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, atol=1e-5, rtol=1e-5)


def test_large_images_need_little_memory() -> None:
    """Why: the volume of all pairs of 1920x1080 would take 2.8 GB in half precision."""
    half = load_model("nano", "cuda", precision="float16")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine = make_engine(half, False, size=(1080, 1920))
    results = stream(engine, frames(3, 1080, 1920))
    assert results[-1].info.runtime == "graphs" and np.isfinite(results[-1].flow).all()
    assert torch.cuda.max_memory_allocated() < 1.5e9
    engine.close()
