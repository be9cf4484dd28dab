# SPDX-License-Identifier: Apache-2.0
"""The benchmark data sets: what is read is what the images show, and what the ground truth says of it."""

import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_layouts import SIZE, WRITERS, Scene, corner_mask, mean_difference

from training.datasets import DATASETS, open_dataset
from training.evaluate import measure


@pytest.mark.parametrize(
    ("name", "split", "options", "pairs", "runs", "first"),
    [
        ("chairs", "train", {}, 3, [1, 1, 1], "00001"),
        ("chairs", "val", {}, 1, [1], "00003"),
        ("things-clean", "train", {}, 8, [2, 2, 2, 2], "TRAIN/A/0000/into_future/left/0006"),
        ("things-final", "test", {}, 4, [2, 2], "TEST/B/0001/into_future/left/0006"),
        ("sintel-clean", "train", {}, 6, [3, 3], "alley_1/frame_0001"),
        ("sintel-final", "train", {}, 6, [3, 3], "alley_1/frame_0001"),
        ("kitti-2012", "train", {}, 2, [1, 1], "000000_10"),
        ("kitti-2015", "train", {}, 2, [1, 1], "000000_10"),
        ("hd1k", "train", {}, 4, [2, 2], "000000_0000"),
        ("spring", "train", {}, 4, [2, 2], "0001/flow_FW_left/flow_FW_left_0001"),
        ("spring", "train", {"side": "both", "direction": "both"}, 16, [2] * 8, "0001/flow_FW_left/flow_FW_left_0001"),
        ("spring", "train", {"side": "right", "direction": "backward"}, 4, [2, 2],
         "0001/flow_BW_right/flow_BW_right_0003"),
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
    kitti = open_dataset("kitti-2015", roots("kitti-2015"))[0]
    assert 0.6 < kitti.valid.mean() < 0.73 and 0.05 < kitti.occluded[kitti.valid].mean() < 0.15
    assert not kitti.occluded[~kitti.valid].any()
    things = open_dataset("things-clean", roots("things-clean"))[0]
    assert np.argwhere(~things.valid).tolist() == [[3, 5]]
    spring = open_dataset("spring", roots("spring"))[0]
    assert np.argwhere(~spring.valid).tolist() == [[3, 5]] and spring.occluded is None


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
