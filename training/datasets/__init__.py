# SPDX-License-Identifier: Apache-2.0
"""The benchmark data sets, each read from its official folder layout: ``open_dataset``. See docs/datasets.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from deq_flow_ros.errors import did_you_mean
from training.datasets.base import FlowDataset, Sample
from training.datasets.measured import Hd1k, Kitti, Middlebury
from training.datasets.rendered import FlyingChairs, FlyingThings3D, Sintel, Spring, TartanAir

__all__ = ["DATASETS", "FlowDataset", "Sample", "open_dataset"]

DATASETS: dict[str, Callable[..., FlowDataset]] = {
    "chairs": FlyingChairs,
    "things-clean": partial(FlyingThings3D, render_pass="clean"),
    "things-final": partial(FlyingThings3D, render_pass="final"),
    "sintel-clean": partial(Sintel, render_pass="clean"),
    "sintel-final": partial(Sintel, render_pass="final"),
    "kitti-2012": partial(Kitti, images="colored_0"),
    "kitti-2015": partial(Kitti, images="image_2"),
    "hd1k": Hd1k,
    "spring": Spring,
    "tartanair": TartanAir,
    "middlebury": Middlebury,
}
"""Name of a data set to what opens it: called with name, root, split and the data set's own options."""


def open_dataset(name: str, root: str | Path, split: str = "train", **options: Any) -> FlowDataset:
    """The pairs of a data set.

    :param name: one of ``DATASETS``.
    :param root: the folder that docs/datasets.md names.
    :param split: "train", and "test" or "val" where the data set has them.
    :raises ValueError: for an unknown name, split or option value.
    :raises FileNotFoundError: naming the first file or folder that is missing.
    """
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise ValueError(f"unknown data set {name!r}{hint}: there are {', '.join(DATASETS)}")
    return DATASETS[name](name, root, split, **options)
