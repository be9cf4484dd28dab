# SPDX-License-Identifier: Apache-2.0
"""Every call of an engine is timed and has a price, and a stream decides without what only an engine knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from streams import PERIOD_NS, Clock, frames

from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.streaming import EagerEngine, EstimatorSettings, FlowEstimator, Stream, UpdateRequest, update_together
from deq_flow_ros.streaming.continuity import UNEXPLAINED, UNMATCHED
from deq_flow_ros.streaming.eager import Slot
from deq_flow_ros.streaming.interface import Likeness, Solved
from deq_flow_ros.streaming.plan import MAX_PIXELS


def test_encoding_again_at_another_scale_is_timed_and_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: it takes as long as encoding the frame itself, and once was in no stage: such frames were late.

    10 ms an image, 20 ms an iteration, whatever the scale: of 100 ms a frame has time for 4, and for 3 where the last
    frame is encoded again. The stages are all of the time.
    """
    model = load_model("nano")  # whose motion is believed, or pairs would start cold
    clock = Clock(model, monkeypatch)
    estimator = FlowEstimator(model, latency_budget_ms=100, max_iterations=50, tolerance_px=None)
    estimator.warm_up(200, 240)
    learnt = {}
    for i, frame in enumerate(frames(8, 200, 240)):
        if i == 5:
            estimator.change(max_scale=0.75)
        result = estimator.update(frame, i * PERIOD_NS, clock.now_ns)
        if result is not None and i > 3:
            learnt[i] = (result.info.scale, result.info.iterations, round(result.info.stage_ms.get("reencode", 0.0)))
            assert sum(result.info.stage_ms.values()) == pytest.approx(result.info.latency_ms)
            assert not result.info.over_budget
    assert learnt == {4: (1.0, 4, 0), 5: (0.75, 3, 10), 6: (0.75, 4, 0), 7: (0.75, 4, 0)}


def test_the_host_waits_for_the_device_twice_a_frame_at_most(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: on a GPU each value that is read ends what runs ahead; a batch of cameras must not read one by one."""
    reads: list[str] = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu"):
        true = getattr(torch.Tensor, name)

        def reading(tensor: torch.Tensor, *arguments: Any, name: str = name, true: Any = true) -> Any:
            reads.append(name)
            return true(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, reading)
    estimators = [FlowEstimator(model, max_iterations=2, tolerance_px=None) for _ in range(3)]
    for i, frame in enumerate(frames(3)):
        reads.clear()
        update_together([UpdateRequest(estimator, frame, i * PERIOD_NS) for estimator in estimators])
    # What the solver itself reads on the CPU alone aside: the likenesses; then fields and figures, in one piece.
    assert [name for name in reads if name != "__bool__"] == ["tolist", "cpu"]


def test_an_engine_of_ones_own_computes_for_any_number_of_streams(model: DEQFlow) -> None:
    """Why: that is how another runtime takes the place of the eager one; streams of one engine can share a batch."""
    engine = EagerEngine(model)
    estimators = [FlowEstimator(engine, max_iterations=2) for _ in range(2)]
    for i, frame in enumerate(frames(2)):
        results = update_together([UpdateRequest(estimator, frame, i * PERIOD_NS) for estimator in estimators])
    assert [result.info.batch_size for result in results if result is not None] == [2, 2]
    with pytest.raises(ValueError, match="one model, clock and runtime"):
        requests = [UpdateRequest(e, frame, 2 * PERIOD_NS) for e in (estimators[0], FlowEstimator(model))]
        update_together(requests)
    assert FlowEstimator(model).engine is FlowEstimator(model).engine


def solved(image: np.ndarray, likeness: float) -> Solved:
    field = np.zeros((*image.shape[:2], 2), np.float32)
    return Solved(field, field[..., 0], None, 1, 1, 0.5, "iterations", likeness)


def test_a_judgement_does_not_outlive_its_stream() -> None:
    """Why: after a pair judged unlike, settings changed to cold starts once made every later pair say so."""
    stream = Stream(EstimatorSettings(), MAX_PIXELS, Slot())
    reasons = []
    for i, image in enumerate(frames(6)):
        if i == 4:
            stream.reset("asked for")
            stream.change(EstimatorSettings(warm=False))
        turn = stream.take(image, i * PERIOD_NS, 0, None)
        stream.plan(turn, 0, 1)
        if turn.starts:
            stream.begin(turn)
            continue
        found = 0.9 if i < 3 else 0.1
        turn.alike = Likeness(found, found) if stream.settings.warm else None
        stream.limits(turn, {}, 1)
        info = stream.conclude(turn, solved(image, found), {"solve": 1.0}, 0, 1)
        reasons.append((info.warm, info.reset_reason, stream.reset_reason))
    unlike, misled = UNMATCHED, UNEXPLAINED
    assert reasons == [(False, "start", None), (True, None, None), (False, misled, unlike), (False, "asked for", None)]
