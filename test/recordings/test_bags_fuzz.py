# SPDX-License-Identifier: Apache-2.0
"""A few of the damaged bags of ``python test/fuzz_bags.py``, which tries 2,000 of each container."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mcap", reason="writes MCAP files with chunks")
from fuzz_bags import COUNT, DAMAGES, try_bags, write_bags


def test_whatever_happens_to_a_bag_reading_it_ends_and_says_what_is_missing(tmp_path: Path) -> None:
    """Disks, copies and killed recorders: never a traceback, never a hang, and no frame missing without a word."""
    tallies = dict(try_bags(write_bags(tmp_path), tmp_path, range(2 * len(DAMAGES))))
    assert [line for tally in tallies.values() for line in tally.wrong] == []
    for name, tally in tallies.items():
        assert tally.outcomes["damage named"] >= 3, f"{name}: the damage is noticed"
        assert tally.frames > 2 * COUNT, f"{name}: and what is left is read"
