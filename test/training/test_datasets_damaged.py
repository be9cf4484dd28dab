# SPDX-License-Identifier: Apache-2.0
"""The benchmark data sets: whatever is missing, damaged or asked for wrongly is named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from dataset_layouts import SIZE, write_chairs

from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.flow_files import write_flow
from training.datasets import DATASETS, open_dataset


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("chairs", "FlyingChairs_release/data"),
        ("chairs", "FlyingChairs_release/data/00002_flow.flo"),
        ("chairs", "FlyingChairs_train_val.txt"),
        ("things-clean", "frames_cleanpass/TRAIN"),
        ("things-clean", "frames_cleanpass/TRAIN/A/0000/left/0007.png"),
        ("things-clean", "optical_flow/TRAIN/C/0004/into_past/left/OpticalFlowIntoPast_0007_L.pfm"),
        ("sintel-final", "training/final"),
        ("sintel-final", "training/final/alley_1/frame_0002.png"),
        ("sintel-clean", "training/flow/market_2/frame_0003.flo"),
        ("sintel-clean", "training/occlusions"),
        ("sintel-clean", "training/invalid/alley_1/frame_0001.png"),
        ("kitti-2012", "training/colored_0"),
        ("kitti-2015", "training/image_2/000001_11.png"),
        ("kitti-2015", "training/flow_noc/000000_10.png"),
        ("hd1k", "hd1k_flow_gt/flow_occ/000001_0001.png"),
        ("spring", "train"),
        ("spring", "train/0002/frame_left"),
        ("spring", "train/0001/flow_FW_left/flow_FW_left_0002.flo5"),
        ("middlebury", "other-gt-flow"),
        ("middlebury", "other-data/Grove2/frame11.png"),
        ("middlebury", "other-gt-flow/Venus/flow10.flo"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(roots: Callable[[str], Path], tmp_path: Path, name: str, gone: str) -> None:
    """Why: half a data set must be noticed before the training, with the one path that says what to fetch."""
    root = tmp_path / "root"
    shutil.copytree(roots(name), root)
    path = root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        open_dataset(name, root)
    assert str(error.value).startswith(f"{path} is missing. Data set {name} expects below {root}: ")


def test_nothing_and_nonsense_are_refused(roots: Callable[[str], Path], tmp_path: Path) -> None:
    """Why: an empty folder must not give an empty data set, and a typing error must show what is allowed."""
    for name in DATASETS:
        with pytest.raises(FileNotFoundError, match=name):
            open_dataset(name, tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="expects below"):
            open_dataset(name, tmp_path)
        with pytest.raises(ValueError, match="split: expected one of train"):
            open_dataset(name, roots(name), "training")
    with pytest.raises(ValueError, match=r"unknown data set 'sintel' .*: there are chairs, .*sintel-clean"):
        open_dataset("sintel", tmp_path)
    with pytest.raises(ValueError, match="side: expected one of left, right, both, got 'middle'"):
        open_dataset("spring", roots("spring"), side="middle")
    with pytest.raises(ValueError, match="direction: expected one of forward, backward, both, got 'into_past'"):
        open_dataset("spring", roots("spring"), direction="into_past")


def test_a_wrong_split_file_is_refused(tmp_path: Path) -> None:
    """Why: with another list of pairs the validation pairs would be trained on."""
    write_chairs(tmp_path)
    split = tmp_path / "FlyingChairs_train_val.txt"
    for content, message in (
        ("1\n1\n0\n1\n", r"FlyingChairs_train_val.txt: expected 1 .* or 2 .* got another in line 3"),
        ("1\n1\n", "a line for each pair, got 2 lines, but there is .*00003_img1.ppm"),
        ("", "got 0 lines"),
    ):
        split.write_text(content)
        with pytest.raises(MediaError, match=message):
            open_dataset("chairs", tmp_path)
    split.write_text("1\n1\n2\n1\n1\n")
    with pytest.raises(FileNotFoundError, match=r"00005_img1.ppm is missing"):
        open_dataset("chairs", tmp_path)


def test_damaged_files_are_named(roots: Callable[[str], Path], tmp_path: Path) -> None:
    """Why: one bad file among forty thousand has to be found from the message alone."""
    sintel, spring = tmp_path / "sintel", tmp_path / "spring"
    for name, root in (("sintel-clean", sintel), ("spring", spring)):
        shutil.copytree(roots(name), root)
    image, mask = sintel / "training/clean/alley_1/frame_0002.png", sintel / "training/invalid/alley_1/frame_0001.png"
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(MediaError, match=r"clean/alley_1/frame_0002.png cannot be read as an image"):
        open_dataset("sintel-clean", sintel)[0]
    image.write_bytes(cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()[:-20])
    with pytest.raises(MediaError, match=r"frame_0002.png cannot be read as an image: not a whole image"):
        open_dataset("sintel-clean", sintel)[0]
    cv2.imwrite(str(image), np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(MediaError, match=r"frame_0002.png: expected 64x48, .* got 20x10"):
        open_dataset("sintel-clean", sintel)[0]
    shutil.copy(image.with_name("frame_0003.png"), image)
    cv2.imwrite(str(mask), np.zeros((10, 20), np.uint8))
    with pytest.raises(MediaError, match=r"invalid/alley_1/frame_0001.png: expected 64x48, .* got 20x10"):
        open_dataset("sintel-clean", sintel)[0]
    flow = spring / "train/0001/flow_FW_left/flow_FW_left_0001.flo5"
    write_flow(flow, np.zeros((*SIZE, 2)))
    with pytest.raises(MediaError, match=r"flow_FW_left_0001.flo5: expected 128x96, .* got 64x48"):
        open_dataset("spring", spring)[0]
    with h5py.File(flow, "w") as file:
        file["disparity"] = np.zeros((96, 128))
    with pytest.raises(MediaError, match=r"flow_FW_left_0001.flo5.*data set named 'flow'"):
        open_dataset("spring", spring)[0]
