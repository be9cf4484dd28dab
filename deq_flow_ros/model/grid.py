# SPDX-License-Identifier: Apache-2.0
"""Tensors that depend only on a size and a device. They are made once for each, not for each pair."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
KEPT = 64
"""Results kept per function, enough for several image sizes and scales on one or two devices."""


def once_per_size(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator that caches the results of a function of sizes and devices. Nobody may write to the results.

    While a graph is traced for export or compilation, the cache is not used, because tensors of a trace are not valid
    outside of it.
    """

    def make(*arguments: Hashable) -> T:
        with torch.inference_mode(False):  # otherwise the result could not be used in training later
            return function(*arguments)  # type: ignore[call-arg, arg-type]

    kept = lru_cache(maxsize=KEPT)(make)

    @wraps(function)
    def get(*arguments: P.args, **named: P.kwargs) -> T:
        return function(*arguments) if torch.compiler.is_compiling() else kept(*arguments)  # type: ignore[call-arg]

    return get


@once_per_size
def positions(height: int, width: int, device: torch.device) -> Tensor:
    """(2, height, width) float32: x and y of every cell."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack((x, y))
