# SPDX-License-Identifier: Apache-2.0
"""Flow files: what is written comes back, in the layout that other tools read, and damaged files are refused."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.flow_files import read_flow, write_flow


def some_flow() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    flow = rng.uniform(-200, 200, (5, 7, 2)).astype(np.float32)
    valid = rng.random((5, 7)) > 0.3
    flow[~valid] = np.nan
    return flow, valid


@pytest.mark.parametrize(("name", "tolerance"), [("a.flo", 0.0), ("a.png", 1 / 128), ("a.pfm", 0.0), ("a.flo5", 0.0)])
def test_written_flow_comes_back(tmp_path: Path, name: str, tolerance: float) -> None:
    """Why: vectors and validity must survive: exactly, or to half a step of 1/64 px in KITTI's format."""
    flow, valid = some_flow()
    write_flow(tmp_path / name, flow)
    back, back_valid = read_flow(tmp_path / name)
    assert back.dtype == np.float32 and np.array_equal(back_valid, valid)
    assert np.abs(back - flow)[valid].max() <= tolerance
    assert not back[~valid].any()


def test_layouts_are_those_of_the_data_sets(tmp_path: Path) -> None:
    """Why: a symmetric mistake in reader and writer would pass a round trip: here the bytes are made by hand."""
    (tmp_path / "hand.flo").write_bytes(struct.pack("<fii", 202021.25, 2, 1) + struct.pack("<4f", 1.5, -2.5, 2e9, 0))
    flow, valid = read_flow(tmp_path / "hand.flo")
    assert flow.tolist() == [[[1.5, -2.5], [0, 0]]] and valid.tolist() == [[True, False]]
    # KITTI: red is u, green is v, blue is validity; OpenCV writes blue first.
    cv2.imwrite(str(tmp_path / "hand.png"), np.array([[[1, 32768 - 64, 32768 + 96]]], np.uint16))
    flow, valid = read_flow(tmp_path / "hand.png")
    assert flow.tolist() == [[[1.5, -1.0]]] and valid.tolist() == [[True]]
    # PFM: the bottom row comes first, a third channel follows, and a positive scale says big-endian.
    rows = (5.0, 6.0, 99.0, 7.0, np.nan, 99.0, 1.0, 2.0, 99.0, 3.0, 4.0, 99.0)
    for scale, order in ((b"-1.0", "<"), (b"1", ">")):
        (tmp_path / "hand.pfm").write_bytes(b"PF\n2 2\n" + scale + b"\n" + struct.pack(f"{order}12f", *rows))
        flow, valid = read_flow(tmp_path / "hand.pfm")
        assert flow.tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
        assert valid.tolist() == [[True, True], [True, False]]
    with h5py.File(tmp_path / "hand.flo5", "w") as file:
        file["flow"] = np.array([[[1.5, -2.5], [np.nan, 0]]])  # float64 is as good
    flow, valid = read_flow(tmp_path / "hand.flo5")
    assert flow.tolist() == [[[1.5, -2.5], [0, 0]]] and valid.tolist() == [[True, False]]


def write_damaged_files(folder: Path) -> dict[str, str]:
    """Files that are not what they seem, and what the error must say of each."""
    flow, _ = some_flow()
    for name in ("a.flo", "a.png", "a.pfm", "a.flo5"):
        write_flow(folder / name, flow)
    flo, pfm, flo5 = ((folder / name).read_bytes() for name in ("a.flo", "a.pfm", "a.flo5"))
    huge_png = bytearray((folder / "a.png").read_bytes())
    huge_png[16:24] = struct.pack(">II", 12_000, 12_000)
    huge_png[29:33] = struct.pack(">I", zlib.crc32(huge_png[12:29]))
    files = {
        "short.flo": (flo[:-8], "truncated or damaged: expected 292 bytes for 7x5, got 284"),
        "foreign.flo": (b"PIEX" + flo[4:], "is not a .flo file: expected it to begin with"),
        "size.flo": (flo[:4] + struct.pack("<ii", -1, 5) + flo[12:], "states a size of -1x5"),
        "huge.flo": (flo[:4] + struct.pack("<ii", 99_999, 99_999) + flo[12:], "states a size of 99999x99999"),
        "pfm.flo": (pfm, "is not a .flo file"),
        "broken.png": (b"\x89PNG broken", "cannot be read as PNG"),
        "short.png": ((folder / "a.png").read_bytes()[:-20], "cannot be read as PNG"),
        "huge.png": (bytes(huge_png), "states a size of 12000x12000"),
        "short.pfm": (pfm[:-1], "truncated or damaged"),
        "long.pfm": (pfm + b"\n", "truncated or damaged"),
        "grey.pfm": (b"Pf" + pfm[2:], "is it a disparity"),
        "scale.pfm": (pfm.replace(b"-1.0", b"-0.0"), "expected a scale other than 0"),
        "huge.pfm": (pfm.replace(b"7 5", b"70000 50000"), "states a size of 70000x50000"),
        "flo.pfm": (flo, "is not a .pfm file"),
        "short.flo5": (flo5[: len(flo5) // 2], "is not a .flo5 file, or is truncated"),
        "pfm.flo5": (pfm, "is not a .flo5 file"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    cv2.imwrite(str(folder / "photo.png"), np.zeros((5, 7, 3), np.uint8))
    return {name: message for name, (_, message) in files.items()} | {
        "photo.png": "expected 16 bits and 3 channels, got uint8",
        "none.flo": "does not exist",
        "a.txt": "expected a flow file named",
    }


def write_hostile_hdf5(folder: Path) -> dict[str, str]:
    """HDF5 files of a few kilobytes that would take gigabytes, or other files' content, to read."""
    contents: dict[str, tuple[dict[str, object], str]] = {
        "rank": ({"flow": np.zeros((5, 7))}, r"shape \(H, W, 2\), got float64 of shape \(5, 7\)"),
        "integers": ({"flow": np.zeros((5, 7, 2), int)}, "got int64"),
        "name": ({"disparity": np.zeros((5, 7, 2))}, r"data set named 'flow', got \['disparity'\]"),
        "group": ({"flow/flow": np.zeros((5, 7, 2))}, "data set named 'flow'"),
        "link": ({"flow": h5py.ExternalLink("a.flo5", "flow")}, "data set named 'flow'"),
    }
    for name, (items, _) in contents.items():
        with h5py.File(folder / f"{name}.flo5", "w") as file:
            for key, value in items.items():
                file[key] = value
    with h5py.File(folder / "huge.flo5", "w") as file:
        file.create_dataset("flow", (99_999, 99_999, 2), "f4", chunks=(64, 64, 2))
    with h5py.File(folder / "sparse.flo5", "w") as file:
        file.create_dataset("flow", (10_000, 10_000, 2), "f4", chunks=(64, 64, 2))[:64, :64] = 1
    with h5py.File(folder / "empty.flo5", "w") as file:
        file.create_dataset("flow", (10_000, 10_000, 2), "f4")
    with h5py.File(folder / "elsewhere.flo5", "w") as file:
        file.create_dataset("flow", (5, 7, 2), "f4", external=[(str(folder / "a.flo"), 0, 280)])
    return {f"{name}.flo5": message for name, (_, message) in contents.items()} | {
        "huge.flo5": "states a size of 99999x99999",
        "sparse.flo5": "but holds only",
        "empty.flo5": "but holds only 0",
        "elsewhere.flo5": "but holds only",
    }


def test_damaged_and_mislabelled_files_are_refused(tmp_path: Path) -> None:
    """Why: a silently wrong ground truth is worse than none, and a header must not make the reader allocate."""
    messages = write_damaged_files(tmp_path) | write_hostile_hdf5(tmp_path)
    read_flow(tmp_path / "a.flo5")  # what is imported on first use is not the reader's
    tracemalloc.start()
    try:
        for name, message in messages.items():
            with pytest.raises(MediaError, match=message):
                read_flow(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Why: KITTI's format ends at 512 px: wrapping around would turn fast motion around."""
    with pytest.raises(MediaError, match=r"within \+-512 px.*got 600"):
        write_flow(tmp_path / "a.png", np.full((2, 2, 2), 600.0))
    with pytest.raises(MediaError, match=r"shape \(H, W, 2\), got \(2, 2\)"):
        write_flow(tmp_path / "a.flo", np.zeros((2, 2)))
    with pytest.raises(MediaError, match="finite flow where it is valid"):
        write_flow(tmp_path / "a.flo", np.full((2, 2, 2), np.nan), np.ones((2, 2), bool))
    with pytest.raises(MediaError, match="cannot write"):
        write_flow(tmp_path / "nowhere" / "a.pfm", np.zeros((2, 2, 2)))
