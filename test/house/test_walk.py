# SPDX-License-Identifier: Apache-2.0
"""The way of a frame through the files of the node, as docs/design.md shows it."""

import re
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("rclpy", reason="needs ROS 2")
from walk import MAIN_WAY, MAX_CHANGES, MAX_ROOMS, Walk, trace

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def walk() -> Walk:
    return trace()


def test_a_frame_goes_through_few_files(walk: Walk) -> None:
    """Why: whoever follows a frame has to open each of them, and to keep in mind what calls what."""
    assert 30 < len(walk.changes) <= MAX_CHANGES and 10 < len(walk.rooms) <= MAX_ROOMS


def test_the_main_way_is_short_and_leads_in_one_direction(walk: Walk) -> None:
    """Why: with calls back and forth nobody knows where a frame is."""
    assert len(MAIN_WAY) <= 8 and sorted(walk.main_rooms) == sorted(MAIN_WAY)
    assert walk.backward() == []


def test_the_page_and_its_figure_show_the_files_of_the_trace(walk: Walk) -> None:
    """Why: a map that is not true leads astray; python test/walk.py --figure docs/figures/walk.png draws it anew."""
    rooms = [*walk.rooms, "ros/accounts.py"]
    section = (DOCS / "design.md").read_text().split("## One frame")[1].split("\n## ")[0]
    assert re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE) == rooms
    with Image.open(DOCS / "figures" / "walk.png") as figure:
        assert figure.info["rooms"].split() == rooms
