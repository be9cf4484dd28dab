# SPDX-License-Identifier: Apache-2.0
"""The benchmark data sets: what is read is what the images show, and whatever is missing or damaged is named."""

import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
from dataset_layouts import (
    SIZE,
    Scene,
    corner_mask,
    mean_difference,
    write_chairs,
    write_hd1k,
    write_kitti,
    write_middlebury,
    write_sintel,
    write_spring,
    write_tartanair,
    write_things,
)  # fmt: skip

from deq_flow_ros.media import MediaError
from deq_flow_ros.media.flow_files import write_flow
from training.datasets import DATASETS, open_dataset
from training.metrics import measure

WRITERS: dict[str, Callable[[Path], None]] = {
    "chairs": write_chairs,
    "things-clean": write_things,
    "things-final": write_things,
    "sintel-clean": write_sintel,
    "sintel-final": write_sintel,
    "kitti-2012": lambda root: write_kitti(root, 2012),
    "kitti-2015": write_kitti,
    "hd1k": write_hd1k,
    "spring": write_spring,
    "tartanair": write_tartanair,
    "middlebury": write_middlebury,
}


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize(
    ("name", "split", "options", "pairs", "runs", "first"),
    [
        ("chairs", "train", {}, 3, [1, 1, 1], "00001"),
        ("chairs", "val", {}, 1, [1], "00003"),
        ("things-clean", "train", {}, 8, [2, 2, 2, 2], "TRAIN/A/0000/into_future/left/0006"),
        ("things-clean", "test", {"side": "both"}, 8, [2, 2, 2, 2], "TEST/B/0001/into_future/left/0006"),
        ("things-final", "train", {"side": "right", "direction": "into_past"}, 4, [2, 2],
         "TRAIN/A/0000/into_past/right/0008"),
        ("sintel-clean", "train", {}, 6, [3, 3], "alley_1/frame_0001"),
        ("sintel-final", "train", {}, 6, [3, 3], "alley_1/frame_0001"),
        ("kitti-2012", "train", {}, 2, [1, 1], "000000_10"),
        ("kitti-2015", "train", {}, 2, [1, 1], "000000_10"),
        ("hd1k", "train", {}, 4, [2, 2], "000000_0000"),
        ("spring", "train", {}, 4, [2, 2], "0001/flow_FW_left/flow_FW_left_0001"),
        ("spring", "train", {"side": "both", "direction": "both"}, 16, [2] * 8, "0001/flow_FW_left/flow_FW_left_0001"),
        ("spring", "train", {"side": "right", "direction": "backward"}, 4, [2, 2],
         "0001/flow_BW_right/flow_BW_right_0003"),
        ("tartanair", "train", {}, 4, [2, 2], "ocean/ocean/Hard/P001/000000"),
        ("middlebury", "train", {}, 2, [1, 1], "Grove2"),
    ],
)  # fmt: skip
def test_flow_is_what_happens_between_the_images(
    roots: Callable[[str], Path],
    name: str,
    split: str,
    options: dict[str, str],
    pairs: int,
    runs: list[int],
    first: str,
) -> None:
    """Why: a wrong frame, sign, order of channels or row, or the other camera's flow, would pass any test of shapes."""
    dataset = open_dataset(name, roots(name), split, **options)
    assert len(dataset) == pairs and [len(run) for run in dataset.sequences()] == runs
    assert dataset[0].name == f"{name}/{first}"
    assert dataset.sparse == (name in ("kitti-2012", "kitti-2015", "hd1k"))
    for index in range(pairs):
        sample = dataset[index]
        assert sample.image1.dtype == sample.image2.dtype == np.uint8 and sample.image1.shape == (*SIZE, 3)
        assert sample.flow is not None and sample.flow.dtype == np.float32 and sample.flow.shape == (*SIZE, 2)
        assert sample.valid.dtype == bool and not sample.flow[~sample.valid].any()
        still = np.zeros_like(sample.flow)
        assert mean_difference(sample.image1, sample.image2, sample.flow, sample.valid) < 1.5
        assert mean_difference(sample.image1, sample.image2, still, sample.valid) > 5
    for run in dataset.sequences():
        for before, after in pairwise(run):
            assert np.array_equal(dataset[before].image2, dataset[after].image1)


def test_every_data_set_is_tested(roots: Callable[[str], Path]) -> None:
    """Why: a data set added without tests would not be noticed; loaders hand data sets to other processes."""
    assert list(WRITERS) == list(DATASETS)
    for name in DATASETS:
        dataset = open_dataset(name, roots(name))
        copy = pickle.loads(pickle.dumps(dataset))
        assert len(copy) == len(dataset) and copy[-1].name == dataset[len(dataset) - 1].name
        with pytest.raises(IndexError):
            dataset[len(dataset)]


@pytest.mark.parametrize(
    ("name", "pairs", "options"),
    [
        ("sintel-final", 3, {}), ("kitti-2012", 2, {}), ("kitti-2015", 2, {}), ("hd1k", 1, {}), ("middlebury", 1, {}),
        ("spring", 8, {"side": "both", "direction": "both"}),
    ],
)  # fmt: skip
def test_splits_without_public_ground_truth(
    roots: Callable[[str], Path], name: str, pairs: int, options: dict[str, Any]
) -> None:
    """Why: submissions are made of these; nothing in them may look like ground truth."""
    dataset = open_dataset(name, roots(name), "test", **options)
    assert len(dataset) == pairs
    for sample in (dataset[index] for index in range(pairs)):
        assert sample.flow is None and sample.occluded is None
        assert sample.valid.shape == SIZE and not sample.valid.any()


def test_validity_and_occlusion_are_those_of_the_data_sets(roots: Callable[[str], Path]) -> None:
    """Why: errors at pixels without ground truth, or hidden ones called visible, falsify every figure."""
    first, last = (corner_mask(SIZE, corner) > 0 for corner in ("first", "last"))
    sintel = open_dataset("sintel-clean", roots("sintel-clean"))[0]
    y, x = np.indices(SIZE) + Scene(0).flow(0, 1).transpose(2, 0, 1)[::-1]
    outside = (x < -0.5) | (y < -0.5) | (x > SIZE[1] - 0.5) | (y > SIZE[0] - 0.5)
    assert (outside & ~last).any()
    assert np.array_equal(sintel.valid, ~first)
    assert np.array_equal(sintel.occluded[sintel.valid], (last | outside)[sintel.valid])
    tartanair = open_dataset("tartanair", roots("tartanair"))[0]
    assert np.array_equal(tartanair.valid, ~(first | last)) and np.array_equal(tartanair.occluded, first | last)
    kitti = open_dataset("kitti-2015", roots("kitti-2015"))[0]
    assert 0.6 < kitti.valid.mean() < 0.73 and 0.05 < kitti.occluded[kitti.valid].mean() < 0.15
    assert not kitti.occluded[~kitti.valid].any()
    things = open_dataset("things-clean", roots("things-clean"))[0]
    assert np.argwhere(~things.valid).tolist() == [[3, 5]]
    spring = open_dataset("spring", roots("spring"))[0]
    assert np.argwhere(~spring.valid).tolist() == [[3, 5]] and spring.occluded is None
    spring = open_dataset("spring", roots("spring"), direction="backward", occlusion=True)[0]
    assert np.array_equal(spring.occluded, first | last)


def test_spring_counts_the_nearest_of_four_vectors(roots: Callable[[str], Path]) -> None:
    """Why: the benchmark's ground truth is finer than its images, an edge inside a pixel counts as either side."""
    sample = open_dataset("spring", roots("spring"))[0]
    fine = Scene(0).flow(0, 1, resolution=2)
    for alternative, (row, column) in zip(sample.alternatives, ((0, 1), (1, 0), (1, 1)), strict=True):
        there = fine[row::2, column::2]
        assert np.array_equal(alternative[sample.valid], there[sample.valid])
        assert measure(there, sample)["all"].error_px == 0
    lengths = np.linalg.norm(fine, axis=2).reshape(SIZE[0], 2, SIZE[1], 2)
    estimate = np.full((*SIZE, 2), 100, np.float32)
    errors = np.linalg.norm(fine - 100, axis=2).reshape(SIZE[0], 2, SIZE[1], 2).min(axis=(1, 3))[sample.valid]
    tallies = measure(estimate, sample)
    assert tallies["all"].error_px == pytest.approx(errors.sum(), rel=1e-6)
    assert tallies["s0-10"].pixels == (lengths.mean(axis=(1, 3))[sample.valid] < 10).sum()


def test_things_leaves_out_what_its_list_says(tmp_path: Path) -> None:
    """Why: a listed frame spoils the pair before it as well as its own, and what is left is no sequence any more."""
    write_things(tmp_path, clips=("TRAIN/A/0000", "TRAIN/C/0004"), frames=5)
    unused = tmp_path / "unused.txt"
    unused.write_text("TRAIN/A/0000/left/0008.png\nTRAIN/A/0000/right/0006.png\nTRAIN/C/0004/left/0010.png\n")
    dataset = open_dataset("things-clean", tmp_path, direction="into_future", unused=unused)
    kept = {"TRAIN/A/0000": ("0006", "0009"), "TRAIN/C/0004": ("0006", "0007", "0008")}
    names = [f"{clip}/into_future/left/{frame}" for clip, frames in kept.items() for frame in frames]
    assert [files.name for files in dataset.pairs] == names
    assert dataset.sequences() == [[0], [1], [2, 3, 4]]


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
        ("tartanair", "office/Easy/P000/flow/000001_000002_mask.npy"),
        ("tartanair", "ocean/ocean/Hard/P001/image_left/000001_left.png"),
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


def test_spring_needs_its_maps_only_for_occlusion(roots: Callable[[str], Path], tmp_path: Path) -> None:
    """Why: the maps are an archive of their own, that most have not fetched."""
    shutil.copytree(roots("spring"), tmp_path / "spring")
    shutil.rmtree(tmp_path / "spring/train/0002/maps/matchmap_flow_FW_left")
    assert len(open_dataset("spring", tmp_path / "spring")) == 4
    with pytest.raises(FileNotFoundError, match="0002/maps/matchmap_flow_FW_left is missing"):
        open_dataset("spring", tmp_path / "spring", occlusion=True)


def test_nothing_and_nonsense_are_refused(roots: Callable[[str], Path], tmp_path: Path) -> None:
    """Why: an empty folder must not give an empty data set, and a typing error must show what is allowed."""
    for name in DATASETS:
        with pytest.raises(FileNotFoundError, match=name):
            open_dataset(name, tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="expects below"):
            open_dataset(name, tmp_path)
        with pytest.raises(ValueError, match="split: expected one of train"):
            open_dataset(name, roots(name), "training")
    with pytest.raises(ValueError, match=r"unknown data set 'sintel': there are chairs, .*sintel-clean"):
        open_dataset("sintel", tmp_path)
    with pytest.raises(ValueError, match="side: expected one of left, right, both, got 'middle'"):
        open_dataset("spring", roots("spring"), side="middle")
    with pytest.raises(ValueError, match="direction: expected one of into_future"):
        open_dataset("things-clean", roots("things-clean"), direction="forward")


def test_a_wrong_split_file_is_refused(tmp_path: Path) -> None:
    """Why: with another list of pairs the validation pairs would be trained on."""
    write_chairs(tmp_path)
    split = tmp_path / "FlyingChairs_train_val.txt"
    for content, message in (
        ("1\n1\n0\n1\n", r"FlyingChairs_train_val.txt: expected 1 .* or 2 .* got '0' in line 3"),
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
    sintel, tartanair, spring = tmp_path / "sintel", tmp_path / "tartanair", tmp_path / "spring"
    for name, root in (("sintel-clean", sintel), ("tartanair", tartanair), ("spring", spring)):
        shutil.copytree(roots(name), root)
    image, mask = sintel / "training/clean/alley_1/frame_0002.png", sintel / "training/invalid/alley_1/frame_0001.png"
    image.write_bytes(image.read_bytes()[:-100])
    with pytest.raises(MediaError, match=r"clean/alley_1/frame_0002.png cannot be read as an image"):
        open_dataset("sintel-clean", sintel)[0]
    cv2.imwrite(str(image), np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(MediaError, match=r"frame_0002.png: expected 64x48, .* got 20x10"):
        open_dataset("sintel-clean", sintel)[0]
    shutil.copy(image.with_name("frame_0003.png"), image)
    cv2.imwrite(str(mask), np.zeros((10, 20), np.uint8))
    with pytest.raises(MediaError, match=r"invalid/alley_1/frame_0001.png: expected 64x48, .* got 20x10"):
        open_dataset("sintel-clean", sintel)[0]
    flow = tartanair / "ocean/ocean/Hard/P001/flow/000000_000001_flow.npy"
    for array, message in (
        (np.zeros((*SIZE, 3), np.float32), r"got float32 of shape \(48, 64, 3\)"),
        (np.zeros((*SIZE, 2), int), "got int64"),
        (np.array([{}]), "Python objects"),
    ):
        np.save(flow, array)
        with pytest.raises(MediaError, match=message):
            open_dataset("tartanair", tartanair)[0]
    flow.write_bytes(flow.read_bytes()[:-4])
    with pytest.raises(MediaError, match=r"000000_000001_flow.npy cannot be read"):
        open_dataset("tartanair", tartanair)[0]
    flow = spring / "train/0001/flow_FW_left/flow_FW_left_0001.flo5"
    write_flow(flow, np.zeros((*SIZE, 2)))
    with pytest.raises(MediaError, match=r"flow_FW_left_0001.flo5: expected 128x96, .* got 64x48"):
        open_dataset("spring", spring)[0]
    with h5py.File(flow, "w") as file:
        file["disparity"] = np.zeros((96, 128))
    with pytest.raises(MediaError, match=r"flow_FW_left_0001.flo5.*data set named 'flow'"):
        open_dataset("spring", spring)[0]
