# SPDX-License-Identifier: Apache-2.0
"""What the weights that ship must be able to do: on pictures made here, so that nothing has to be downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import accuracy
from deq_flow_ros.model import DEQFlow, available_models, load_model
from deq_flow_ros.model.weights import WEIGHTS_DIR
from deq_flow_ros.streaming import FlowEstimator

PAIRS = Path(__file__).parents[3] / "shared" / "data" / "pairs.json"


@pytest.fixture(scope="module")
def nano() -> DEQFlow:
    return load_model("nano")


def picture(height: int, width: int, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """(H, W, 3) uint8: noise of several scales, moved by a displacement in pixels, exactly."""
    rng = np.random.default_rng(0)
    y, x = torch.meshgrid(torch.arange(height) - dy, torch.arange(width) - dx, indexing="ij")
    total = torch.zeros(1, 3, height, width)
    for cell, amplitude in ((4, 30), (12, 40), (40, 60)):
        grid = torch.from_numpy(rng.uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32))
        where = torch.stack((x, y), -1)[None].float() / (cell * 16) - 0.5
        total += amplitude * F.grid_sample(grid, where, mode="bicubic", padding_mode="reflection", align_corners=False)
    return (total[0] + 127).clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def mean_error(flow: np.ndarray, dx: float, dy: float) -> float:
    """Mean endpoint error in px, away from the border, beyond which nothing is known."""
    return float(np.linalg.norm(flow[16:-16, 16:-16] - (dx, dy), axis=2).mean())


def solve_pair(model: DEQFlow, image1: np.ndarray, image2: np.ndarray, **settings: int) -> np.ndarray:
    pair = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in (image1, image2))
    return model(*pair, **settings).flow[0].permute(1, 2, 0).numpy()


def test_a_static_pair_has_no_flow(nano: DEQFlow) -> None:
    """Why: a robot that stands still must not see motion, whatever the sensor's noise."""
    still = picture(128, 192)
    noise = np.random.default_rng(1).normal(0, 3, still.shape)
    noisy = np.clip(still + noise, 0, 255).astype(np.uint8)
    assert mean_error(solve_pair(nano, still, still), 0, 0) < 0.1
    assert mean_error(solve_pair(nano, still, noisy), 0, 0) < 0.2


@pytest.mark.parametrize("side", [16, 32, 40])
def test_images_of_a_few_cells_are_seen_as_well(nano: DEQFlow, side: int) -> None:
    """Why: at their own size they have near-zero flow, reported as converged, whatever moves in them."""
    estimator = FlowEstimator(nano, max_iterations=8)
    flow = None
    for i in range(3):
        frame = picture(side + 32, side + 32, 3.0 * i, 2.0 * i)[16:-16, 16:-16]
        result = estimator.update(np.ascontiguousarray(frame), i * 33_000_000)
        flow = result.flow if result else flow
    assert flow is not None and flow.shape == (side, side, 2)
    assert np.linalg.norm(flow - (3.0, 2.0), axis=2).mean() < 0.8


@pytest.mark.parametrize(("dx", "dy"), [(2.5, -1.25), (-12.0, 6.0), (30.0, 0.0)])
def test_motion_is_found(nano: DEQFlow, dx: float, dy: float) -> None:
    """Why: sign, axes and scale of the flow, from a fraction of a pixel to a sixth of the width."""
    flow = solve_pair(nano, picture(128, 192), picture(128, 192, dx, dy), max_iterations=12, coarse_levels=2)
    inside = flow[40:-40, 40:-40] - (dx, dy)
    assert float(np.linalg.norm(inside, axis=2).mean()) < 0.05 * max(np.hypot(dx, dy), 8)


@pytest.mark.parametrize("name", available_models())
def test_every_model_is_small_has_its_card_and_settles(name: str) -> None:
    """Why: a wrong or damaged file would be noticed by users only, and a state that drifts would spoil warm starts."""
    assert (WEIGHTS_DIR / f"{name}.safetensors").stat().st_size < 12e6
    assert (WEIGHTS_DIR / f"{name}.md").read_text().startswith(f"# {name}\n")
    model, image1, image2 = load_model(name), picture(128, 192), picture(128, 192, 4, 2)
    early, late = (solve_pair(model, image1, image2, max_iterations=n) for n in (12, 48))
    assert mean_error(early, 4, 2) < 0.4 and float(np.linalg.norm(late - early, axis=2).mean()) < 0.05


@pytest.mark.parametrize("name", available_models())
def test_what_has_no_texture_is_uncertain(name: str) -> None:
    """Why: a flow of zero on a plain wall is no measured standstill, and one behind a cut is no motion."""
    model, still = load_model(name), torch.from_numpy(picture(128, 192)).permute(2, 0, 1)[None]
    plain, other = torch.full_like(still, 128), still.flip(3)
    certain, unknown, cut = (
        float(model(*pair, max_iterations=12).uncertainty.median())
        for pair in ((still, still), (plain, plain), (still, other))
    )
    assert certain < 0.2 and unknown > 1 and cut > 1
    assert min(unknown, cut) > 5 * certain


def test_a_warm_start_is_worth_iterations(nano: DEQFlow) -> None:
    """Why: the reason for streaming. With one iteration a frame, a stream must be nearly as good as a settled pair."""
    frames = [picture(128, 192, 14.0 * i, -6.0 * i) for i in range(6)]
    estimator = FlowEstimator(nano, max_iterations=1, tolerance_px=None)
    for i, frame in enumerate(frames):
        result = estimator.update(frame, i * 33_000_000)
    assert result is not None and result.info.warm
    cold, settled = (
        nano(*(torch.from_numpy(frame).permute(2, 0, 1)[None] for frame in frames[-2:]), max_iterations=iterations)
        for iterations in (1, 24)
    )
    cold_error, settled_error = (mean_error(one.flow[0].permute(1, 2, 0).numpy(), 14, -6) for one in (cold, settled))
    assert mean_error(result.flow, 14, -6) - settled_error < 0.25 * (cold_error - settled_error)
    assert result.info.residual_px < 0.3 * float(cold.residual_px)


@pytest.mark.skipif(not PAIRS.is_file(), reason=f"no image pairs with ground truth at {PAIRS}")
def test_the_accuracy_benchmark_beats_zero_flow_on_real_images(tmp_path: Path) -> None:
    """Why: weights and benchmark on real images, end to end: the smallest of the pairs, to keep it short."""
    entries = [e for e in json.loads(PAIRS.read_text()) if e["name"] == "piv/backstep"]
    for entry in entries:
        entry.update({key: str(PAIRS.parent / entry[key]) for key in ("image1", "image2", "flow")})
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    arguments = ["--pairs", str(tmp_path / "pairs.json"), "--json", str(tmp_path / "out.json")]
    assert accuracy.main([*arguments, "--iterations", "6", "--scale", "1", "--dtype", "bfloat16"]) == 0
    methods = json.loads((tmp_path / "out.json").read_text())["methods"]
    assert 0 < methods["nano, 6 coarse to fine"]["distance_px"] < 0.02 and not methods["zero flow"]["distance_px"]
    assert set(methods) >= {"nano, 6 from zero", "nano, 6 coarse to fine", "zero flow", "Farneback", "DIS medium"}
    assert methods["nano, 6 coarse to fine"]["epe_px"]["mean"] < 0.5 * methods["zero flow"]["epe_px"]["mean"]


def test_the_benchmark_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why: exit status 2 and the path, not a traceback."""
    assert accuracy.main(["--pairs", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().out.replace("\n", "")


def test_bfloat16_weights_give_the_same_flow_and_keep_it_in_float32(nano: DEQFlow) -> None:
    """Why: half the memory traffic must not cost accuracy: bfloat16 alone would know 30 px to an eighth of one."""
    half = load_model("nano", precision="bfloat16")
    images = [torch.from_numpy(picture(96, 128, *moved)).permute(2, 0, 1)[None] for moved in ((0.0, 0.0), (6.3, -2.7))]
    expected, got = (model(*images, max_iterations=12) for model in (nano, half))
    assert got.flow.dtype == got.state[1].dtype == torch.float32 and got.state[0].dtype == torch.bfloat16
    assert (got.flow - expected.flow).norm(dim=1).mean() < 0.05
    stream = FlowEstimator(half, latency_budget_ms=None, max_iterations=2)
    results = [stream.update(picture(96, 128, float(dx)), dx) for dx in range(3)]
    assert results[2] is not None and results[2].info.warm and results[2].flow.dtype == np.float32
    assert mean_error(results[2].flow, 1, 0) < 0.3
