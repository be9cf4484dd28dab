# SPDX-License-Identifier: Apache-2.0
"""The model computes what the released model computes, on weights and images made from formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from released_reference import PARITY, formula_image, formula_weights, needs_parity, reference_case

from deq_flow_ros.model import load_model

CASES = ("tiny_wnorm_k1", "tiny_wnorm_k6", "tiny_wnorm_k24", "base_k6", "base_gma_wnorm_k6", "large_wnorm_k6")


@needs_parity
@pytest.mark.parametrize("case", CASES)
def test_flow_equals_the_released_models(case: str, tmp_path: Path) -> None:
    """Why: a released checkpoint must give its own results here, not nearly so."""
    spec = reference_case(case)
    path = tmp_path / f"{case}.pth"
    torch.save(formula_weights(spec["state_dict"]), path)
    model = load_model(path)
    height, width = spec["image_height"], spec["image_width"]
    image1, image2 = formula_image(height, width, 0, 0), formula_image(height, width, 2.5, -1.25)
    prediction = model(image1, image2, max_iterations=spec["iterations"])
    reference = np.load(PARITY / f"{case}.npz")
    for got, key in ((prediction.flow, "flow_up"), (prediction.state[1], "flow_low"), (prediction.state[0], "hidden")):
        np.testing.assert_allclose(got.numpy(), reference[key], atol=1e-3, err_msg=key)
