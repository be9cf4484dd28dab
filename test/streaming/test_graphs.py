# SPDX-License-Identifier: Apache-2.0
"""The engine of captured graphs, on a device that refuses what CUDA would and counts what costs time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_capture import CaptureError
from fake_graphs import FakeDevice, assert_same, make_engine, stream
from streams import PERIOD_NS, frames

from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.model.cells import carry
from deq_flow_ros.streaming import EagerEngine, FlowEstimator, FlowResult, UpdateRequest, graph_engine, update_together
from deq_flow_ros.streaming.capture import Parts
from deq_flow_ros.streaming.graph_engine import GraphEngine


@pytest.fixture(scope="module")
def model() -> DEQFlow:
    return load_model("nano")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"direction": "backward"},
        {"tolerance_px": 0.3, "max_iterations": 8},
        {"min_scale": 0.75, "max_scale": 0.75},
        {"min_scale": 1.5, "max_scale": 1.5},
        {"warm": False, "uncertainty": True},
    ],
    ids=str,
)
def test_graphs_give_the_flow_of_eager_calls(model: DEQFlow, settings: dict[str, object]) -> None:
    """Why: a runtime is for speed alone; cold and warm pairs, padding, other scales and stopping included."""
    images = frames(6, 68, 76, step=3)
    engine, device = make_engine(model)
    got = stream(engine, images, **settings)
    assert_same(got, stream(EagerEngine(model), images, **settings))
    assert [result.info.runtime for result in got] == ["eager"] + ["graphs"] * 4
    assert device.captures > 0
    if settings.get("uncertainty"):
        expected = stream(EagerEngine(model), images, **settings)[-1].uncertainty
        np.testing.assert_allclose(got[-1].uncertainty, expected, rtol=1e-4)


def test_a_frame_waits_twice_and_makes_nothing_new(model: DEQFlow) -> None:
    """Why: a wait leaves the device idle, and memory or graphs made for each frame would fill it in hours."""
    engine, device = make_engine(model)
    estimator, page_locked = FlowEstimator(engine, max_iterations=3, tolerance_px=None), []
    for i, image in enumerate(frames(8)):
        waits, pins, captures, replays = device.waits, device.pins, device.captures, device.replays
        estimator.update(image, i * PERIOD_NS)
        estimator.prepare()
        page_locked.append(device.page_locked)
        if i > 3:
            assert device.waits - waits == 2, "for the likenesses, then for the result"
            assert device.pins - pins == 1, "the result itself, which is its caller's"
            assert device.captures == captures
            # Encode, match, pair, begin, three iterations, finish, and carrying the state along.
            assert device.replays - replays == 9
    assert len(set(page_locked[4:])) == 1, "each result's memory is that of an earlier one, which nobody has any more"


def test_the_host_is_one_iteration_ahead_at_most_where_it_may_have_to_stop(model: DEQFlow) -> None:
    """Why: iterations queued in vain take the device's time; and a host that waits for each leaves it idle."""
    engine, device = make_engine(model)
    results = stream(engine, frames(5), max_iterations=50, tolerance_px=1.0)
    last = results[-1].info
    assert last.stop_reason == "converged" and last.iterations < 12
    assert device.pauses > 0
    replays = device.replays
    more = stream(engine, frames(2), max_iterations=50, tolerance_px=1.0)[-1].info
    assert device.replays - replays <= more.iterations + 2 + 8


def test_cameras_are_one_batch_of_one_graph(model: DEQFlow) -> None:
    """Why: for a GPU a batch is hardly more work than one of it; one camera's cut must not touch the others."""
    images = [frames(6, seed=seed) for seed in range(3)]
    images[1][4:] = frames(2, seed=9)
    settings = {"max_iterations": 2, "tolerance_px": None}
    engine, _ = make_engine(model)
    estimators = [FlowEstimator(engine, **settings) for _ in images]
    results: list[list[FlowResult]] = [[], [], []]
    for i in range(6):
        requests = [UpdateRequest(e, images[k][i], i * PERIOD_NS) for k, e in enumerate(estimators)]
        for k, result in enumerate(update_together(requests)):
            if result is not None:
                results[k].append(result)
    assert results[0][-1].info.runtime == "graphs" and results[0][-1].info.batch_size == 3
    for k in range(3):
        assert_same(results[k], stream(EagerEngine(model), images[k], **settings))


@pytest.mark.parametrize("budget_ms", [2.0, 3.0, 5.0, 10.0])
def test_a_deadline_is_kept_and_used(model: DEQFlow, budget_ms: float) -> None:
    """Why: iterations are begun by what the device has still to do and by what they cost there, without waiting.

    Replays take 0.25 ms each: 6 of them besides the iterations.
    """
    device = FakeDevice(replay_ms=0.25)
    engine = GraphEngine(model, device.clock, device, behind=False)
    estimator = FlowEstimator(
        engine, latency_budget_ms=budget_ms, max_iterations=60, tolerance_px=None, min_scale=1.0, max_scale=1.0
    )
    estimator.warm_up(48, 64)
    made = []
    for i, image in enumerate(frames(12)):
        device.clock.time_ns += PERIOD_NS
        result = estimator.update(image, i * PERIOD_NS)
        estimator.prepare()
        if result is not None:
            assert result.info.latency_ms <= budget_ms, (i, result.info)
            made.append(result.info.iterations)
    possible = (budget_ms - 6 * 0.25) / 0.25
    assert 0.5 * possible <= np.mean(made[2:]) + 1 and np.mean(made[2:]) <= possible + 1, (made, possible)


def test_a_diverged_sample_is_told(model: DEQFlow) -> None:
    """Why: whoever is iterated by a graph must be given up as elsewhere, and its stream begin anew."""
    engine, _ = make_engine(model)
    estimator = FlowEstimator(engine, max_iterations=2)
    images = frames(7)
    for i, image in enumerate(images[:5]):
        estimator.update(image, i * PERIOD_NS)
    assert estimator.stream.slot.state is not None
    hidden, flow = estimator.stream.slot.state
    estimator.stream.slot.state = torch.full_like(hidden, torch.nan), flow
    result = estimator.update(images[5], 5 * PERIOD_NS)
    assert result is not None and result.info.runtime == "graphs" and result.info.stop_reason == "diverged"
    assert estimator.reset_reason == "the state was not finite"
    again = estimator.update(images[6], 6 * PERIOD_NS)
    assert again is not None and again.info.stop_reason != "diverged" and np.isfinite(again.flow).all()


def test_sizes_are_bounded_and_given_back(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: graphs of every size that was ever met would fill the device."""
    monkeypatch.setattr(graph_engine, "KEPT", 2)
    engine, device = make_engine(model)
    for width in (64, 72, 80):
        stream(engine, frames(4, width=width))
    assert engine.about == "graphs of 2 size(s)"
    captures = device.captures
    stream(engine, frames(4, width=80))
    assert device.captures == captures, "the last one is still there"
    engine.close()
    assert engine.about == "graphs of 0 size(s)"
    assert stream(engine, frames(2))[0].info.runtime == "eager"


def test_more_sizes_at_a_time_than_are_kept_do_not_push_each_other_out(
    model: DEQFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: graphs would be made for each frame of each camera, and none would ever be used twice."""
    monkeypatch.setattr(graph_engine, "KEPT", 1)
    engine, device = make_engine(model)
    estimators = [FlowEstimator(engine, max_iterations=1) for _ in range(2)]
    images = [frames(8, width=width) for width in (64, 72)]
    captures = []
    for i in range(8):
        for estimator, pictures in zip(estimators, images, strict=True):
            estimator.update(pictures[i], i * PERIOD_NS)
        captures.append(device.captures)
    assert captures[4] == captures[-1]


def test_graphs_are_made_behind_a_stream_that_goes_on(model: DEQFlow) -> None:
    """Why: making them takes seconds; the stream must not stand still, and somebody must see when they are there."""
    device = FakeDevice()
    engine = GraphEngine(model, device.clock, device)
    estimator = FlowEstimator(engine, max_iterations=1)
    runtimes = []
    for i, image in enumerate(frames(8)):
        if i == 6:
            assert engine._shelf._thread is not None
            engine._shelf._thread.join()
        result = estimator.update(image, i * PERIOD_NS)
        if result is not None:
            runtimes.append(result.info.runtime)
    assert runtimes[0] == "eager" and runtimes[-1] == "graphs"


def test_parts_compile_for_any_number_of_sizes() -> None:
    """Why: PyTorch compiles one code for eight sizes and refuses the ninth; streams change between more scales.

    Traced as for a card, without the compiler behind it, which takes a minute.
    """
    for height in range(8, 19):
        state = torch.rand(1, 4, height, 8), torch.rand(1, 2, height, 8)
        moved = Parts.compiled(backend="eager").move(state, torch.ones(()))
        torch.testing.assert_close(moved, carry(state))


def test_what_cannot_be_captured_leaves_the_frames_eager(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a robot without flow is worse off than one with slow flow; the reason must be told."""
    engine, device = make_engine(model)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore of it")

    monkeypatch.setattr(device, "capture", fail)
    results = stream(engine, frames(5))
    assert {result.info.runtime for result in results} == {"eager"}
    assert engine.about == "graphs of 0 size(s); none for (48, 64): RuntimeError: CUDA error: out of memory"


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0]) * x[:2],
        lambda x: x.masked_select(x > 0),
    ],
)
def test_the_device_of_these_tests_is_as_strict_as_cuda(reads: object) -> None:
    """Why: what it let pass would be found on a card only."""
    device, x = FakeDevice(), torch.ones(3)
    with pytest.raises(CaptureError):
        device.capture(lambda: reads(x), device.pool())
    inside: list[torch.Tensor] = []
    captured = device.capture(lambda: (inside.append(x * 2), inside[-1] + 1)[1], device.pool())
    x.fill_(5)
    assert captured.outputs.isnan().all(), "nothing is computed until it is replayed"
    captured.replay()
    assert captured.outputs.tolist() == [11.0] * 3
    assert inside[-1].isnan().all(), "other graphs of the pool use what is not returned"
