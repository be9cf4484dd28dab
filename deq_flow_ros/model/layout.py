# SPDX-License-Identifier: Apache-2.0
"""Compares the tensors of a file with those of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deq_flow_ros.model.precision import DTYPES


class WeightsError(ValueError):
    """A weights file cannot be used; the message says why."""


def check_layout(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse tensors that are not exactly the expected ones, except that numbers may have any type of ``DTYPES``.

    :param path: the file, to be named in the error.
    :raises WeightsError: if tensors are missing, unexpected, or of the wrong shape or type; the message names them.
    """
    problems = [f"missing: {name}" for name in expected if name not in got]
    problems += [f"unexpected: {name}" for name in got if name not in expected]
    for name in (name for name in expected if name in got):
        shape, like = tuple(got[name].shape), tuple(expected[name].shape)
        if shape != like:
            problems.append(f"wrong shape: {name} is {shape}, expected {like}")
        elif got[name].dtype not in (types := _stored_types(expected[name])):  # float64 would silently lose digits
            accepted = " or ".join(map(str, types))
            problems.append(f"wrong type: {name} is {got[name].dtype}, expected {accepted}")
    if problems:
        listed = "\n  ".join(problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise WeightsError(f"{path} does not fit its architecture:\n  {listed}{more}")


def _stored_types(tensor: Tensor) -> tuple[torch.dtype, ...]:
    """The types that a file may use for a tensor. Counters are integers, of exactly one type."""
    return tuple(DTYPES.values()) if tensor.is_floating_point() else (tensor.dtype,)
