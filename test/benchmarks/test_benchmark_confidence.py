# SPDX-License-Identifier: Apache-2.0
"""The benchmark of confidence: its curves against figures worked out by hand, and what it shows of a plain area."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import confidence
from benchmarks.confidence import STEPS, calibration, means, sparsify
from deq_flow_ros.model import SIZES, DEQFlow, save_model

RANDOM = np.random.default_rng(0)


def test_the_error_itself_is_perfect_and_a_constant_knows_nothing() -> None:
    """Why: these two are the ends of the scale on which every measure is judged."""
    error = RANDOM.exponential(1, 1000)
    np.testing.assert_allclose(*sparsify(error, 3 * error + 1))
    nothing, oracle = sparsify(error, np.zeros(1000))
    np.testing.assert_allclose(nothing, 1)
    wrong, _ = sparsify(error, -error)
    assert (wrong - oracle).mean() > 1.5 * (1 - oracle).mean(), "the wrong way round is worse than nothing"


def test_the_curve_is_the_mean_of_what_is_left() -> None:
    """Why: taken out are the most uncertain; ties go together, whatever their order; no opinion is the largest."""
    error = np.repeat([4.0, 1.0, 0.0], (100, 100, 200))
    uncertainty = np.repeat([np.nan, 2.0, 2.0], (100, 100, 200))
    curve, oracle = sparsify(error, uncertainty)
    mean = 1.25
    assert curve[0] == 1 and oracle[0] == 1
    assert curve[25] == pytest.approx((100 / 300) / mean) and oracle[25] == pytest.approx((1 / 3) / mean)
    assert curve[75] == pytest.approx((100 / 300) / mean), "the rest is alike, so its mean stays"
    assert oracle[50] == 0
    order = RANDOM.permutation(400)
    np.testing.assert_allclose(sparsify(error[order], uncertainty[order]), (curve, oracle), atol=1e-12)
    assert len(curve) == STEPS


def test_forward_backward_is_zero_where_the_way_back_is_the_way_forth() -> None:
    """Why: sampled at another place than the flow leads to, it would call every motion uncertain."""
    shift = np.full((20, 30, 2), (3.0, -2.0), np.float32)
    np.testing.assert_allclose(confidence.forward_backward(shift, -shift), 0, atol=1e-6)
    back = -shift
    back[10, 15] += (0, 4)
    distance = confidence.forward_backward(shift, back)
    assert distance[12, 12] == pytest.approx(4) and np.count_nonzero(distance) == 1


def test_calibration_weighs_pairs_alike() -> None:
    """Why: a large image must not count more than a small one; and the curve is that of the mean errors."""
    rows = []
    for expected, error, share in ((1.0, 2.0, 0.5), (1.0, 4.0, 0.25)):
        bins = {"share": [share, 0.0], "expected_px": [share * expected, 0.0], "error_px": [share * error, 0.0]}
        rows.append({"pair": "a/1", "group": "a", "bins": bins})
    curve = calibration(rows)["pairs"]
    assert curve["expected_px"] == [1.0] and curve["share"] == [0.375]
    assert curve["error_px"] == [pytest.approx((0.5 * 2 + 0.25 * 4) / 0.75)]


def test_the_benchmark_runs_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: the figures of the docs come out of this command, with a plain area beside the clips as they are."""
    monkeypatch.setattr(confidence, "PATTERNS", 4)  # making them takes longer than all else
    torch.manual_seed(0)
    save_model(DEQFlow(replace(SIZES["nano"], uncertainty_dim=8)), tmp_path / "head.safetensors")
    arguments = ["--clips", "1", "--height", "64", "--width", "96", "--iterations", "2"]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert confidence.main([*arguments, "--model", str(tmp_path / "head.safetensors"), *files]) == 0
    assert "calibration, generated" in capsys.readouterr().out and (tmp_path / "out.png").stat().st_size > 1000
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [row["group"] for row in figures["pairs"]] == ["generated", "plain area"]
    measures = {"residual", "forward-backward", "weak gradient", "uncertainty", "random"}
    assert set(figures["pairs"][0]["ause"]) == measures
    plain = figures["pairs"][1]
    assert plain["inside"]["weak gradient"] < 0.5 * plain["outside"]["weak gradient"]
    assert [entry["group"] for entry in means(figures["pairs"])] == ["generated", "plain area"]
    assert confidence.main(["--clips", "1", "--model", "vast"]) == 2
    assert "no weights 'vast'" in capsys.readouterr().out
