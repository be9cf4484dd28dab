# SPDX-License-Identifier: Apache-2.0
"""Captures on the CPU as strictly as CUDA does; ``fake_graphs.py`` has the device that uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class CaptureError(AssertionError):
    """What CUDA would not have captured."""


def storages(values: Any) -> set[int]:
    """Of all tensors among them."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def reachable(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors that somebody who has a value can get at; those of networks aside."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    for part in (*inside, *getattr(value, "__dict__", {}).values()):
        yield from reachable(part, seen)


def check_capturable(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """:raises CaptureError: if an operation reads a value, or makes something that depends on one, or on the host."""
    name = str(func)
    if torch.Tag.data_dependent_output in func.tags:
        raise CaptureError(f"{name} reads a value on the host")
    masks = [t for t in tree_leaves(args[1:]) if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
    if name.startswith("aten.index.") and masks:
        raise CaptureError(f"{name} by a mask has a shape that depends on values")
    if torch.Tag.dynamic_output_shape in func.tags and not name.startswith("aten.index."):
        raise CaptureError(f"{name} has a shape that depends on values")
    if name.startswith("aten.lift_fresh") or kwargs.get("pin_memory"):
        raise CaptureError(f"{name} makes memory of the host")


class Tape(TorchDispatchMode):
    """The operations of a function, each with the tensors that it worked on.

    A replay is no call of the function: it repeats the operations on the same tensors, so that whatever the function
    took from Python is as it was when it was captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check_capturable(func, args, kwargs)
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @cached_property
    def made(self) -> set[int]:
        """Storages that the function made: memory of a pool."""
        given: set[int] = set()
        made: set[int] = set()
        for _, args, kwargs, results in self.operations:
            given |= storages((args, kwargs)) - made
            made |= storages(results) - given
        return made

    @cached_property
    def used(self) -> set[int]:
        """All storages that it works on."""
        return storages([operation[1:] for operation in self.operations])

    @cached_property
    def written(self) -> set[int]:
        """Those of results, also of views, which nothing may have been written to."""
        return storages([operation[3] for operation in self.operations])

    def scratch(self, kept: Any) -> list[Tensor]:
        """Memory of the pool that nobody keeps, so that other graphs of the pool use it too."""
        done, found = storages(list(reachable(kept))), []
        for tensor in tree_leaves([operation[3] for operation in self.operations]):
            if isinstance(tensor, Tensor) and storages(tensor) <= self.made - done:
                done |= storages(tensor)
                found.append(tensor)
        return found

    def replay(self, write: Callable[[Tensor, Tensor], None]) -> None:
        """:param write: called for each copy, to and from."""
        for func, args, kwargs, results in self.operations:
            if str(func).startswith("aten.copy_."):
                write(args[0], args[1])
                continue
            again = func(*args, **kwargs)
            given = storages((args, kwargs))
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not storages(old) & given:
                    old.copy_(new)


def scribble(tensors: list[Tensor]) -> None:
    """Leave in memory what others may leave there."""
    for tensor in tensors:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1)


@contextmanager
def no_reads() -> Iterator[None]:
    """Within it this thread reads no value: also not in ways that no operation tells of."""
    thread = threading.get_ident()
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            true = getattr(Tensor, name)

            def refuse(tensor: Tensor, *arguments: Any, name: str = name, true: Any = true) -> Any:
                if threading.get_ident() == thread:
                    raise CaptureError(f"Tensor.{name} reads a value on the host")
                return true(tensor, *arguments)

            patch.setattr(Tensor, name, refuse)
        yield
