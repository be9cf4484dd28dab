# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cuts: what it counts, on sequences whose answer is known."""

from __future__ import annotations

from streams import frames

from benchmarks.cuts import alarms, flat_gives_flow, worse_behind_cut
from deq_flow_ros.model import load_model


def test_cuts_and_alarms_are_counted() -> None:
    """Why: misses and false alarms that documentation states come from here."""
    nano = load_model("nano")
    scene, other = frames(5, 128, 160), frames(3, 128, 160, seed=5)
    assert alarms(nano, scene) == []
    assert len(alarms(nano, [*scene[:3], *other])) == 2  # across the cut, and behind it
    assert worse_behind_cut(nano, scene[:3], other[:2]) is None
    missed = worse_behind_cut(nano, scene[:3], scene[3:])  # no cut at all, so it cannot be noticed
    assert missed is not None and abs(missed) < 0.1
    assert not flat_gives_flow(nano, scene, 0)
