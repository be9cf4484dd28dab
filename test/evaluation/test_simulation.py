# SPDX-License-Identifier: Apache-2.0
"""The simulated robot: what fits is computed, what does not is dropped, and the same costs give the same result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_inputs import PERIOD_NS, frames, pictures, table, write_folder

from deq_flow_ros.evaluation.command import read_costs
from deq_flow_ros.evaluation.methods import Setting, make_estimator
from deq_flow_ros.evaluation.recording import measure_setting
from deq_flow_ros.evaluation.records import FrameRecord, InputFrame
from deq_flow_ros.evaluation.runs import SettingRun, SimulatedRun
from deq_flow_ros.model import DEQFlow, deq_flow
from deq_flow_ros.streaming import FlowInfo
from deq_flow_ros.streaming.clock import CostTable, VirtualClock

PIXELS = 48 * 64


@pytest.fixture(scope="module")
def network() -> DEQFlow:
    torch.manual_seed(0)
    return DEQFlow("nano").eval().requires_grad_(False)


def costs(encode: float, iteration: float, spread: float = 0.0) -> CostTable:
    """ms per stage at 64x48."""
    varied = [iteration - spread, iteration, iteration + spread]
    return CostTable({PIXELS: {"encode": [encode], "coarse": [2 * encode], "iteration": varied, "output": [1.0]}})


def records_of(run: SettingRun, count: int = 12) -> Iterator[FrameRecord]:
    for index, frame in enumerate(frames(pictures(count))):
        yield from run.take(InputFrame.of(index, frame))
    yield from run.finish()


def simulate(model: DEQFlow, setting: Setting, table: CostTable) -> list[FrameRecord]:
    clock = VirtualClock(table)
    return list(records_of(SimulatedRun(clock, PERIOD_NS, setting, make_estimator(setting, model, clock))))


def warm_pairs(records: list[FrameRecord]) -> list[FlowInfo]:
    return [record.info for record in records if record.info is not None and record.info.warm]


def told(records: list[FrameRecord]) -> str:
    """All of them but their arrays."""
    return repr([replace(record, fields=None, frame=None) for record in records])


def test_the_budget_decides_on_iterations_by_the_costs_of_the_table(network: DEQFlow) -> None:
    """10 ms of encoding, 1 ms of output, 4 ms an iteration: 3 of them fit into 25 ms and its reserve, not one more."""
    records = simulate(network, Setting("main", budget_ms=25.0, max_iterations=50, tolerance_px=None), costs(10.0, 4.0))
    assert [record.index for record in records] == list(range(12))
    assert [record.outcome for record in records] == ["first", *["processed"] * 11]
    warm = warm_pairs(records)
    assert {info.iterations for info in warm} == {3} and {info.stop_reason for info in warm} == {"deadline"}
    assert {round(info.latency_ms, 6) for info in warm} == {23.0} and not any(info.over_budget for info in warm)
    assert all(info.stage_ms["encode"] == 10.0 and info.stage_ms["solve"] == 12.0 for info in warm)


def test_a_slow_machine_drops_all_but_the_newest(network: DEQFlow) -> None:
    """80 ms a frame at 30 Hz: two of three frames are superseded, and what waits is taken up when there is time."""
    records = simulate(network, Setting("main", budget_ms=None, max_iterations=1, tolerance_px=None), costs(75.0, 4.0))
    assert [record.index for record in records] == list(range(12)), "in the order of the stream, each once"
    dropped = [record for record in records if record.outcome == "dropped"]
    assert {record.reason for record in dropped} == {"superseded by a newer frame"} and 6 <= len(dropped) <= 8
    late = records[-1].info
    assert late is not None and late.latency_ms == pytest.approx(80 + late.stage_ms["wait"], abs=0.01)
    assert 0 <= late.stage_ms["wait"] < 34


def test_the_same_costs_give_the_same_records(network: DEQFlow) -> None:
    """Costs vary as they were measured to, but in a fixed sequence: without that nothing could be compared."""
    setting = Setting("main", budget_ms=30.0, tolerance_px=None)
    first, second = (simulate(network, setting, costs(8.0, 4.0, spread=2.0)) for _ in range(2))
    assert told(first) == told(second) and len({info.latency_ms for info in warm_pairs(first)}) >= 3
    assert told(simulate(network, setting, costs(8.0, 5.0, spread=2.0))) != told(first)


def test_costs_are_measured_at_every_scale_and_survive_json(network: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is what makes a result repeatable elsewhere; its scales are those that the estimator chooses from."""
    monkeypatch.setattr("deq_flow_ros.evaluation.recording.COST_ROUNDS", 2)
    images = [np.kron(image, np.ones((3, 3, 1), np.uint8)) for image in pictures(3)]  # above the least processed size
    setting = Setting("main", budget_ms=30.0, max_iterations=1)
    measured = measure_setting(setting, network, images, [0.5])
    assert set(measured.stages) == {144 * 192, 126 * 168, 108 * 144}
    for known in measured.stages.values():
        assert {"encode", "prepare", "correlate", "iteration", "upsample", "output", "overhead"} <= set(known)
    again = CostTable.of(json.loads(json.dumps(measured.plain())))
    assert again.times("convert", 144 * 192) == [0.5]
    np.testing.assert_allclose(again.times("encode", 144 * 192), measured.times("encode", 144 * 192), atol=1e-4)
    quadratic = [4 * value for value in again.times("correlate", 144 * 192)]
    assert again.times("correlate", 2 * 144 * 192) == pytest.approx(quadratic)
    monkeypatch.setattr(deq_flow, "MAX_PIXELS", 126 * 168)  # of a model that takes more memory
    assert set(measure_setting(setting, network, images).stages) == {126 * 168, 108 * 144}
    with pytest.raises(ValueError, match="expected a table of costs"):
        CostTable.of({"stage_ms_by_pixels": {"many": {}}})


def test_a_simulation_is_repeated_from_its_own_metrics(
    evaluate: Callable[..., int], metrics_of: Callable[[Path], dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the command line: measured once, then given back, all records and figures of the streams are the same."""
    monkeypatch.setattr("deq_flow_ros.evaluation.recording.COST_ROUNDS", 2)
    folder = write_folder(tmp_path / "pictures", pictures(6))
    common = (folder, "--realtime", "--budget-ms", 40, "--compare", "dis", "--no-bag")
    assert evaluate(*common, "--out", tmp_path / "one") == 0
    metrics = tmp_path / "one" / "metrics.json"
    assert set(read_costs(metrics)) == {"any", "dis"}
    assert evaluate(*common, "--out", tmp_path / "two", "--costs", metrics) == 0
    assert table(tmp_path / "one") == table(tmp_path / "two") and len(table(tmp_path / "one")) == 12
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
    assert one["settings"] == two["settings"] and one["mode"] == "realtime"
    assert one["run"]["played_seconds"] == pytest.approx(6 * PERIOD_NS * 1e-9)
