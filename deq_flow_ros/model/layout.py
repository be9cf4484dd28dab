# SPDX-License-Identifier: Apache-2.0
"""The tensors that a file holds against those that a model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deq_flow_ros.model.precision import DTYPES


class WeightsError(ValueError):
    """A weights file that cannot be used, and why."""


def check_layout(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse tensors that are not exactly those expected, but that numbers may be stored in any type of ``DTYPES``.

    :param path: named in the error.
    :raises WeightsError: naming what is missing, unexpected, of the wrong shape or type.
    """
    problems = [f"missing: {name}" for name in expected if name not in got]
    problems += [f"unexpected: {name}" for name in got if name not in expected]
    for name in (name for name in expected if name in got):
        shape, like = tuple(got[name].shape), tuple(expected[name].shape)
        if shape != like:
            problems.append(f"wrong shape: {name} is {shape}, expected {like}")
        elif got[name].dtype not in (types := _stored_types(expected[name])):  # float64 would lose digits in silence
            accepted = " or ".join(map(str, types))
            problems.append(f"wrong type: {name} is {got[name].dtype}, expected {accepted}")
    if problems:
        listed = "\n  ".join(problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise WeightsError(f"{path} does not fit its architecture:\n  {listed}{more}")


def _stored_types(tensor: Tensor) -> tuple[torch.dtype, ...]:
    """What a file may hold for it; counters are integers, and of one type."""
    return tuple(DTYPES.values()) if tensor.is_floating_point() else (tensor.dtype,)
