# SPDX-License-Identifier: Apache-2.0
"""The simulated robot: what fits is computed, what does not is dropped, and the same costs give the same result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_inputs import PERIOD_NS, frames, pictures, table, write_bag, write_folder, write_model

from deq_flow_ros.evaluation.command import main, read_costs
from deq_flow_ros.evaluation.estimators import make_estimator
from deq_flow_ros.evaluation.realtime import CostTable, RealtimeLane, VirtualClock, measure_costs
from deq_flow_ros.evaluation.results import FrameRecord
from deq_flow_ros.evaluation.runner import Shot, load_models
from deq_flow_ros.evaluation.session import Plan, Session
from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.media import MediaError
from deq_flow_ros.model import DEQFlow, deq_flow, save_model

PIXELS = 48 * 64


@pytest.fixture(scope="module")
def model() -> DEQFlow:
    torch.manual_seed(0)
    return DEQFlow("nano").eval().requires_grad_(False)


def costs(encode: float, iteration: float, spread: float = 0.0) -> CostTable:
    """ms per stage at 64x48."""
    varied = [iteration - spread, iteration, iteration + spread]
    return CostTable({PIXELS: {"encode": [encode], "coarse": [2 * encode], "iteration": varied, "output": [1.0]}})


def simulate(model: DEQFlow, setting: Setting, table: CostTable, count: int = 12) -> Iterator[FrameRecord]:
    clock = VirtualClock(table)
    lane = RealtimeLane(setting, make_estimator(setting, model, clock), clock=clock, period_ns=PERIOD_NS)
    for index, frame in enumerate(frames(pictures(count))):
        yield from (done.record for done in lane.take(Shot.of(index, frame)))
    yield from (done.record for done in lane.finish())


def test_the_budget_decides_on_iterations_by_the_costs_of_the_table(model: DEQFlow) -> None:
    """10 ms of encoding, 1 ms of output, 4 ms an iteration: 3 of them fit into 25 ms and its reserve, not one more."""
    setting = Setting("main", budget_ms=25.0, max_iterations=50, tolerance_px=None)
    records = list(simulate(model, setting, costs(10.0, 4.0)))
    assert [record.index for record in records] == list(range(12))
    assert [record.outcome for record in records] == ["first", *["processed"] * 11]
    warm = [record for record in records if record.warm]
    assert {record.iterations for record in warm} == {3} and {record.stop_reason for record in warm} == {"deadline"}
    assert {round(record.latency_ms, 6) for record in warm} == {23.0} and not any(record.over_budget for record in warm)
    assert all(record.stage_ms["encode"] == 10.0 and record.stage_ms["solve"] == 12.0 for record in warm)


def test_a_slow_machine_drops_all_but_the_newest(model: DEQFlow) -> None:
    """80 ms a frame at 30 Hz: two of three frames are superseded, and what waits is taken up when there is time."""
    setting = Setting("main", budget_ms=None, max_iterations=1, tolerance_px=None)
    records = list(simulate(model, setting, costs(75.0, 4.0)))
    assert [record.index for record in records] == list(range(12)), "in the order of the stream, each once"
    dropped = {record.index for record in records if record.outcome == "dropped"}
    assert {record.reason for record in records if record.outcome == "dropped"} == {"superseded by a newer frame"}
    assert 6 <= len(dropped) <= 8
    late = records[-1]
    assert late.outcome == "processed" and late.latency_ms == pytest.approx(80 + late.stage_ms["wait"], abs=0.01)
    assert 0 <= late.stage_ms["wait"] < 34


def test_the_same_costs_give_the_same_records(model: DEQFlow) -> None:
    """Costs vary as they were measured to, but in a fixed sequence: without that nothing could be compared."""
    setting = Setting("main", budget_ms=30.0, tolerance_px=None)
    first, second = (list(simulate(model, setting, costs(8.0, 4.0, spread=2.0))) for _ in range(2))
    assert first == second and len({record.latency_ms for record in first if record.warm}) >= 3
    other = list(simulate(model, setting, costs(8.0, 5.0, spread=2.0)))
    assert other != first


def test_costs_are_measured_at_every_scale_and_survive_json(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is what makes a result repeatable elsewhere; its scales are those that the estimator chooses from."""
    images = [frame.data.reshape(frame.height, frame.width, 3) for frame in frames(pictures(3))]
    images = [np.kron(image, np.ones((3, 3, 1), np.uint8)) for image in images]  # above the least processed size
    setting = Setting("main", budget_ms=30.0, max_iterations=2)
    measured = measure_costs(setting, model, images, [0.5])
    assert set(measured.stages) == {144 * 192, 126 * 168, 108 * 144}
    for known in measured.stages.values():
        assert {"encode", "prepare", "correlate", "iteration", "upsample", "output", "overhead"} <= set(known)
    assert "coarse" in measured.stages[144 * 192]
    again = CostTable.of(json.loads(json.dumps(measured.plain())))
    assert again.times("convert", 144 * 192) == [0.5]
    np.testing.assert_allclose(again.times("encode", 144 * 192), measured.times("encode", 144 * 192), atol=1e-4)
    quadratic = [4 * value for value in again.times("correlate", 144 * 192)]
    assert again.times("correlate", 2 * 144 * 192) == pytest.approx(quadratic)
    monkeypatch.setattr(deq_flow, "MAX_PIXELS", 126 * 168)  # of a model that takes more memory
    assert set(measure_costs(setting, model, images).stages) == {126 * 168, 108 * 144}
    with pytest.raises(MediaError, match="expected a table of costs"):
        CostTable.of({"stage_ms_by_pixels": {"many": {}}})


def test_a_simulation_is_repeated_from_its_own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line: measured once, then given back, all records and figures of the streams are the same."""
    monkeypatch.setattr("deq_flow_ros.evaluation.report._plots", lambda *_: "")
    weights = write_model(tmp_path / "any.safetensors")
    folder = write_folder(tmp_path / "pictures", pictures())
    compared = ["--compare", "cold:warm=false", "dis"]
    common = [str(folder), "--realtime", "--budget-ms", "40", "--model", str(weights), *compared]
    assert main([*common, "--out", str(tmp_path / "one")]) == 0
    metrics = tmp_path / "one" / "metrics.json"
    assert set(read_costs(metrics)) == {"any", "cold", "dis"}
    assert main([*common, "--out", str(tmp_path / "two"), "--costs", str(metrics)]) == 0
    assert table(tmp_path / "one") == table(tmp_path / "two") and len(table(tmp_path / "one")) == 24
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["settings"] == two["settings"] and one["mode"] == "realtime"
    assert one["run"]["played_seconds"] == pytest.approx(8 * PERIOD_NS * 1e-9)


def test_an_interrupted_simulation_goes_on_bit_by_bit(model: DEQFlow, tmp_path: Path) -> None:
    """What is still to come depends on all that was: clock, costs that were learnt, scale, and the frame that waits."""
    weights = tmp_path / "any.safetensors"
    save_model(model, weights)
    images = [np.kron(image, np.ones((3, 3, 1), np.uint8)) for image in pictures(12)]  # there is a smaller scale
    bag = write_bag(tmp_path / "bag", frames(images))
    taken = {"encode": [8.0, 9.0], "prepare": [1.0], "coarse": [9.0], "iteration": [4.0, 5.0, 7.0], "output": [1.0]}
    setting = Setting("main", model=str(weights), budget_ms=24.0, tolerance_px=None)
    settings = (setting, replace(setting, name="slow", budget_ms=None, max_iterations=6), Setting("dis", method="dis"))
    given = {one.name: CostTable({144 * 192: taken}).plain() for one in settings}
    plan = Plan(settings, mode="realtime", consistency_every=0, bag=False, costs=given)
    models = load_models(settings)
    whole = Session(str(bag), tmp_path / "whole", plan).run(models, lambda *_: None, lambda: False)

    for stop_at in (5, 12):  # in the middle, and with the last frame still waiting
        seen = iter(range(1 if stop_at == 5 else 6, 13))
        with closing(Session(str(bag), tmp_path / "parts", plan, resume=True)) as part:
            outcome = part.run(models, lambda *_: None, lambda seen=seen, stop_at=stop_at: next(seen) == stop_at)
        assert not outcome.run.complete and outcome.run.input["frames"] == stop_at
    rest = Session(str(bag), tmp_path / "parts", plan, resume=True).run(models, lambda *_: None, lambda: False)
    for name in ("main", "slow", "dis"):
        one, other = table(tmp_path / "whole", name), table(tmp_path / "parts", name)
        assert one == other and len(one) == 12
    assert rest.run.complete and rest.run.played_s == whole.run.played_s
    slow = table(tmp_path / "whole", "slow")
    assert {row["outcome"] for row in slow} == {"first", "processed", "dropped"}
    assert len({row["latency_ms"] for row in table(tmp_path / "whole", "main")}) > 4


def test_a_simulation_that_was_killed_at_once_goes_on_with_its_costs(
    model: DEQFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs that are measured anew would give the rest of the frames another machine."""
    weights = tmp_path / "any.safetensors"
    save_model(model, weights)
    bag = write_bag(tmp_path / "bag", frames(pictures(6)))
    plan = Plan((Setting("main", model=str(weights), budget_ms=24.0),), mode="realtime", bag=False)
    tables = [CostTable({PIXELS: {name: [ms] for name in ("encode", "iteration", "output")}}) for ms in (4.0, 9.0)]
    fresh = iter(tables)

    def killed() -> bool:
        raise MemoryError("as by the kernel")

    monkeypatch.setattr("deq_flow_ros.evaluation.session.measure_costs", lambda *_: next(fresh))
    models = load_models(plan.settings)
    with closing(Session(str(bag), tmp_path / "out", plan)) as first, pytest.raises(MemoryError):
        first.run(models, lambda *_: None, killed)
    with closing(Session(str(bag), tmp_path / "out", plan, resume=True)) as second:
        outcome = second.run(models, lambda *_: None, lambda: False)
    assert outcome.run.complete and outcome.run.costs == {"main": tables[0].plain()}
