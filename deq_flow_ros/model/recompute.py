# SPDX-License-Identifier: Apache-2.0
"""Save memory in training: run a part again in the backward pass instead of storing what it computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *inputs: Tensor, owner: nn.Module | None = None) -> Result:
    """``function(*inputs)``, storing only the inputs for the backward pass (arXiv 1604.06174).

    :param owner: the module that the function is, or is part of, if that has batch norms.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if owner is None else _frozen_statistics(owner)

    result: Result = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep batch norms from updating their running statistics: a batch that runs twice must not count twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None  # not counted
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
