# SPDX-License-Identifier: Apache-2.0
"""Flow files: what is written comes back, in the layout that other tools read, and damaged files are refused."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from deq_flow_ros.media import MediaError
from deq_flow_ros.media.flow_files import read_flow, write_flow


def some_flow() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    flow = rng.uniform(-200, 200, (5, 7, 2)).astype(np.float32)
    valid = rng.random((5, 7)) > 0.3
    flow[~valid] = np.nan
    return flow, valid


@pytest.mark.parametrize(("name", "tolerance"), [("a.flo", 0.0), ("a.png", 1 / 128)])
def test_written_flow_comes_back(tmp_path: Path, name: str, tolerance: float) -> None:
    """Vectors and validity survive: exactly in .flo, to half a step of 1/64 px in KITTI's format."""
    flow, valid = some_flow()
    write_flow(tmp_path / name, flow)
    back, back_valid = read_flow(tmp_path / name)
    assert back.dtype == np.float32 and np.array_equal(back_valid, valid)
    assert np.abs(back - flow)[valid].max() <= tolerance
    assert not back[~valid].any()


def test_layouts_are_those_of_the_data_sets(tmp_path: Path) -> None:
    """A symmetric mistake in reader and writer would pass a round trip: here the bytes are made by hand."""
    (tmp_path / "hand.flo").write_bytes(struct.pack("<fii", 202021.25, 2, 1) + struct.pack("<4f", 1.5, -2.5, 2e9, 0))
    flow, valid = read_flow(tmp_path / "hand.flo")
    assert flow.tolist() == [[[1.5, -2.5], [0, 0]]] and valid.tolist() == [[True, False]]
    # KITTI: red is u, green is v, blue is validity; OpenCV writes blue first.
    cv2.imwrite(str(tmp_path / "hand.png"), np.array([[[1, 32768 - 64, 32768 + 96]]], np.uint16))
    flow, valid = read_flow(tmp_path / "hand.png")
    assert flow.tolist() == [[[1.5, -1.0]]] and valid.tolist() == [[True]]


def test_damaged_and_mislabelled_files_are_refused(tmp_path: Path) -> None:
    """A silently wrong ground truth is worse than none."""
    flow, _ = some_flow()
    write_flow(tmp_path / "a.flo", flow)
    whole = (tmp_path / "a.flo").read_bytes()
    (tmp_path / "short.flo").write_bytes(whole[:-8])
    (tmp_path / "foreign.flo").write_bytes(b"PIEX" + whole[4:])
    (tmp_path / "size.flo").write_bytes(whole[:4] + struct.pack("<ii", -1, 5) + whole[12:])
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((5, 7, 3), np.uint8))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    for name, message in (
        ("short.flo", "cut short or damaged: expected 292 bytes for 7x5, got 284"),
        ("foreign.flo", "is no .flo file: expected it to begin with"),
        ("size.flo", "states a size of -1x5"),
        ("photo.png", "expected 16 bits and 3 channels, got uint8"),
        ("broken.png", "cannot be read as PNG"),
        ("none.flo", "does not exist"),
        ("a.txt", "expected a flow file named"),
    ):
        with pytest.raises(MediaError, match=message):
            read_flow(tmp_path / name)


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    """KITTI's format ends at 512 px: wrapping around would turn fast motion around."""
    with pytest.raises(MediaError, match=r"within \+-512 px.*got 600"):
        write_flow(tmp_path / "a.png", np.full((2, 2, 2), 600.0))
    with pytest.raises(MediaError, match=r"shape \(H, W, 2\), got \(2, 2\)"):
        write_flow(tmp_path / "a.flo", np.zeros((2, 2)))
    with pytest.raises(MediaError, match="finite flow where it is valid"):
        write_flow(tmp_path / "a.flo", np.full((2, 2, 2), np.nan), np.ones((2, 2), bool))
