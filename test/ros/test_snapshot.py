# SPDX-License-Identifier: Apache-2.0
"""Snapshots for bug reports: whatever is in one must be what was in the node."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from deq_flow_ros.recordings.flow_files import read_flow
from deq_flow_ros.ros import snapshot
from deq_flow_ros.ros.snapshot import write_snapshot

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "image1": RANDOM.integers(0, 256, (32, 48, 3), np.uint8),
    "image2": RANDOM.integers(0, 256, (32, 48, 3), np.uint8),
    "hidden": RANDOM.normal(size=(1, 8, 4, 6)).astype(np.float32),
    "scale": np.array(0.5),
}
FLOW = RANDOM.normal(size=(32, 48, 2)).astype(np.float32)
RESIDUAL = RANDOM.random((32, 48), np.float32)
ALL = {**ARRAYS, "flow": FLOW, "residual": RESIDUAL}


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    """A report whose images or state are not those of the node leads astray."""
    flow = FLOW.copy()
    flow[3, 4] = np.nan
    metadata = {"parameters": {"roi": (0, 0, 8, 8), "model": "nano"}, "residual_px": np.float32("nan"), "iterations": 3}
    folder = write_snapshot(tmp_path / "new" / "folder", {**ALL, "flow": flow}, metadata)
    assert sorted(path.name for path in folder.iterdir()) == [
        "flow.flo", "flow.png", "image1.png", "image2.png", "snapshot.json", "state.npz",
    ]  # fmt: skip
    for name in ("image1", "image2"):
        np.testing.assert_array_equal(cv2.imread(str(folder / f"{name}.png"))[:, :, ::-1], ARRAYS[name])
    read, valid = read_flow(folder / "flow.flo")
    assert not valid[3, 4] and valid.sum() == valid.size - 1
    np.testing.assert_array_equal(read[valid], flow[valid])
    assert cv2.imread(str(folder / "flow.png")).shape == (32, 48, 3)
    with np.load(folder / "state.npz") as state:
        assert sorted(state) == ["hidden", "residual", "scale"]
        np.testing.assert_array_equal(state["hidden"], ARRAYS["hidden"])
        np.testing.assert_array_equal(state["residual"], RESIDUAL)
    told = json.loads((folder / "snapshot.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert told["parameters"] == {"roi": [0, 0, 8, 8], "model": "nano"}
    assert (told["residual_px"], told["iterations"], told["versions"]["numpy"]) == ("nan", 3, np.__version__)
    assert told["versions"]["rmw"].startswith("rmw_")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Two snapshots within one second are two."""
    folders = [write_snapshot(tmp_path, ALL, {"number": number}) for number in range(3)]
    assert len(set(folders)) == 3
    assert [json.loads((folder / "snapshot.json").read_text())["number"] for folder in folders] == [0, 1, 2]


def test_a_stream_without_flow_has_a_snapshot_too(tmp_path: Path) -> None:
    """Why there is no flow may be the very question."""
    folder = write_snapshot(tmp_path, {}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["snapshot.json", "state.npz"]


def test_what_cannot_be_written_leaves_nothing_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a snapshot would be taken for a whole one."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_snapshot(tmp_path / "file" / "below", ALL, {})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(snapshot, "write_flow", full)
    with pytest.raises(OSError, match="no space left"):
        write_snapshot(tmp_path, ALL, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
