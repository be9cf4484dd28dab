# SPDX-License-Identifier: Apache-2.0
"""Names of images say when they were taken, in which order, which are missing, and that two kinds are mixed."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from deq_flow_ros.recordings import MediaError, open_source

PICTURE = np.full((24, 32, 3), 40, np.uint8)


@pytest.mark.parametrize(
    ("names", "times"),
    [
        (["1403636579763555584", "1403636579813555584"], [1403636579763555584, 1403636579813555584]),
        (["1305031102.9999", "1305031103.03", "1305031103.1"], [1305031102999900000, 1305031103030000000, None]),
        (["cam0_1403636579_63555584", "cam0_1403636579_163555584"], [1403636579063555584, 1403636579163555584]),
        (["img_1700000000100", "img_1700000000200"], [1700000000100000000, 1700000000200000000]),
        (["f0", "f10", "f20"], [1000000000, 1040000000, 1080000000]),
        (["2", "17", "18", "40"], [1000000000, 1040000000, 1080000000, 1120000000]),
    ],
)
def test_times_in_the_names_of_images_are_their_stamps(
    tmp_path: Path, names: list[str], times: list[int | None]
) -> None:
    """EuRoC, TUM RGB-D and other exports name images so; at an assumed rate, every speed and gap would be wrong."""
    for name in names:
        cv2.imwrite(str(tmp_path / f"{name}.png"), PICTURE)
    fps = None if times[0] != 1000000000 else 25
    source = open_source(tmp_path, fps=fps)
    stamps = [frame.stamp_ns for frame in source.frames()]
    assert all(time in (None, stamp) for stamp, time in zip(stamps, times, strict=True)) and not source.skipped
    assert ("times in their names" in source.description) == (fps is None)


@pytest.mark.parametrize(
    "names",
    [
        ["20240131_120058", "20240131_120059", "20240131_120100", "20240131_120101"],
        ["20240229", "20240301", "20240302", "20240303"],
        ["1700000000_0001", "1700000000_0002", "1700000000_0003"],
        ["1200000000000", "1200033333333", "1200066666666"],
    ],
)
def test_dates_and_counters_are_neither_times_nor_have_gaps(tmp_path: Path, names: list[str]) -> None:
    """A minute has no sixty-first second that could be missing, and a counter is no clock: image follows image."""
    for name in names:
        cv2.imwrite(str(tmp_path / f"{name}.png"), PICTURE)
    source = open_source(tmp_path)
    stamps = [frame.stamp_ns for frame in source.frames()]
    assert set(np.diff(stamps)) <= {33333333, 33333334} and not source.skipped
    assert "times in their names" not in source.description


@pytest.mark.parametrize("names", [("f0.color.png", "f0.depth.png"), ("0.jpg", "0.png"), ("left_0.png", "right_0.png")])
def test_images_of_two_kinds_are_no_sequence(tmp_path: Path, names: tuple[str, str]) -> None:
    """Colour and depth by turns, or two cameras, give flow between images that have nothing to do with each other."""
    for name in names:
        cv2.imwrite(str(tmp_path / name), PICTURE)
    with pytest.raises(MediaError, match=f"{names[0]} and {names[1]} have the same number"):
        open_source(tmp_path)
