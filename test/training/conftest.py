# SPDX-License-Identifier: Apache-2.0
"""Data sets in the layouts of the benchmarks, written once for all tests that read them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dataset_layouts import WRITERS


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The root of a data set, written on first use."""
    written: dict[Callable[[Path], None], Path] = {}

    def root(name: str) -> Path:
        writer = WRITERS[name]
        if writer not in written:
            written[writer] = tmp_path_factory.mktemp(name)
            writer(written[writer])
        return written[writer]

    return root


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small arrays gain nothing from threads, and other work may hold the second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
