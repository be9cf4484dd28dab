# SPDX-License-Identifier: Apache-2.0
"""The model computes what the released model computes, on weights and images made from formulas."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from deq_flow_ros.model import WeightsError, load_model

PARITY = Path(__file__).parents[2] / "shared" / "parity"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason=f"no reference outputs at {PARITY}")


def formula_weights(layout: dict[str, list]) -> dict[str, torch.Tensor]:
    """A checkpoint in the released layout with the weights of the reference, see ``parity/README.md``."""
    tensors = {}
    for name, (dtype, shape) in layout.items():
        key = name.removeprefix("module.")
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        a = rng.standard_normal(shape)
        if dtype == "int64":
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        if key.endswith("running_var"):
            a = 1 + 0.1 * abs(a)
        elif key.endswith("running_mean"):
            a = 0.1 * a
        elif key.endswith("bias"):
            a = 0.05 * a
        elif len(shape) == 1:
            a = 1 + 0.05 * a
        elif key.endswith("_g"):
            a = 0.8 * (1 + 0.1 * rng.standard_normal(shape))
        else:
            a = 0.8 * a / np.sqrt(np.prod(shape[1:]))
        tensors[name] = torch.tensor(np.asarray(a), dtype=torch.float32)
    return tensors


def formula_image(height: int, width: int, dx: float, dy: float) -> torch.Tensor:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = x - dx, y - dy
    channels = [
        127 + 60 * np.sin(x / 7 + c) * np.cos(y / 9 - c) + 40 * np.sin((x + 2 * y) / 5 + 2 * c) for c in range(3)
    ]
    return torch.tensor(np.stack(channels)[None], dtype=torch.float32)


@needs_parity
@pytest.mark.parametrize("case", ["tiny_wnorm_k1", "tiny_wnorm_k6", "tiny_wnorm_k24", "base_k6", "large_wnorm_k6"])
def test_flow_equals_the_released_models(case: str, tmp_path: Path) -> None:
    """Why: a released checkpoint must give its own results here, not nearly so."""
    spec = json.loads((PARITY / "cases.json").read_text())[case]
    path = tmp_path / f"{case}.pth"
    torch.save(formula_weights(spec["state_dict"]), path)
    model = load_model(path)
    height, width = spec["image_height"], spec["image_width"]
    image1, image2 = formula_image(height, width, 0, 0), formula_image(height, width, 2.5, -1.25)
    prediction = model(image1, image2, max_iterations=spec["iterations"])
    reference = np.load(PARITY / f"{case}.npz")
    for got, key in ((prediction.flow, "flow_up"), (prediction.state[1], "flow_low"), (prediction.state[0], "hidden")):
        np.testing.assert_allclose(got.numpy(), reference[key], atol=1e-3, err_msg=key)


@needs_parity
def test_a_checkpoint_with_attention_is_refused_by_name(tmp_path: Path) -> None:
    """Why: parts that this model does not have must be named, not dropped."""
    spec = json.loads((PARITY / "cases.json").read_text())["base_gma_wnorm_k6"]
    path = tmp_path / "gma.pth"
    torch.save(formula_weights(spec["state_dict"]), path)
    with pytest.raises(WeightsError, match=r"unexpected: attn\.to_qk\.weight|wrong shape"):
        load_model(path)
