# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and images made from formulas, as those that the reference outputs of the released model are for."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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


def reference_case(name: str) -> dict[str, Any]:
    """One entry of ``parity/cases.json``."""
    return json.loads((PARITY / "cases.json").read_text())[name]
