# SPDX-License-Identifier: Apache-2.0
"""The benchmark data sets, each read from its official folder layout: ``open_dataset``. Sources: docs/datasets.md."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deq_flow_ros import did_you_mean
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.flow_files import read_flow
from training.flow_dataset import (
    FlowDataset,
    PairFiles,
    Truth,
    expect_size,
    leaves_image,
    next_name,
    one_or_both,
    read_mask,
)


class FlyingChairs(FlowDataset):
    """Single pairs. The official split file assigns pair n, by its line n, to training (1) or validation (2)."""

    layout = (
        "FlyingChairs_release/data/00001_{img1.ppm,img2.ppm,flow.flo}, and beside that folder "
        "FlyingChairs_train_val.txt, a download of its own"
    )
    splits: ClassVar[tuple[str, ...]] = ("train", "val")

    def _find(self) -> Iterator[PairFiles]:
        folder = self.root / "FlyingChairs_release" / "data"
        path = self.root / "FlyingChairs_train_val.txt"
        if not path.is_file():
            raise self._missing(path)
        halves = path.read_text(errors="replace").split()
        if wrong := [line for line, half in enumerate(halves, 1) if half not in ("1", "2")]:
            raise MediaError(f"{path}: expected 1 (train) or 2 (val) in each line, got another in line {wrong[0]}")
        beyond = folder / f"{len(halves) + 1:05d}_img1.ppm"
        if beyond.exists():
            raise MediaError(f"{path}: expected a line for each pair, got {len(halves)} lines, but there is {beyond}")
        own = "1" if self.split == "train" else "2"
        for name in (f"{line:05d}" for line, half in enumerate(halves, 1) if half == own):
            image1, image2, flow = (folder / f"{name}_{part}" for part in ("img1.ppm", "img2.ppm", "flow.flo"))
            yield PairFiles(name, name, image1, image2, flow)


class FlyingThings3D(FlowDataset):
    """One pass, clean or final, of the left camera. Pairs into the past are listed from the last frame to the first."""

    layout = (
        "{frames_cleanpass,frames_finalpass}/{TRAIN,TEST}/{A,B,C}/0000/left/0006.png, "
        "optical_flow/{TRAIN,TEST}/{A,B,C}/0000/{into_future,into_past}/left/OpticalFlowIntoFuture_0006_L.pfm"
    )

    def _find(self) -> Iterator[PairFiles]:
        half, passes = self.split.upper(), f"frames_{self.name.removeprefix('things-')}pass"
        clips = [clip for part in self._folders(passes, half) for clip in self._folders(passes, half, part.name)]
        for clip, kind in product(clips, ("IntoFuture", "IntoPast")):
            sequence = f"{half}/{clip.parent.name}/{clip.name}/into_{kind[4:].lower()}/left"
            for first, second in self._successive(self._files(clip / "left", "*.png"), kind == "IntoPast"):
                flow = self.root / "optical_flow" / sequence / f"OpticalFlow{kind}_{first.stem}_L.pfm"
                yield PairFiles(f"{sequence}/{first.stem}", sequence, first, second, flow)


class Sintel(FlowDataset):
    """One pass, clean or final. Invalid pixels are those of the masks ``invalid``.

    Occluded pixels, "unmatched" on the leaderboard, are those of the masks ``occlusions`` and those that leave the
    image: the masks alone do not mark these.
    """

    layout = (
        "training/{clean,final}/SCENE/frame_0001.png, training/{flow,occlusions,invalid}/SCENE/frame_0001.{flo,png}, "
        "test/{clean,final}/SCENE/frame_0001.png"
    )

    def _find(self) -> Iterator[PairFiles]:
        half = "training" if self.split == "train" else "test"
        for scene in self._folders(half, self.name.removeprefix("sintel-")):
            for image1, image2 in self._successive(self._files(scene, "frame_*.png")):
                parts = [self.root / half / kind / scene.name for kind in ("flow", "invalid", "occlusions")]
                flow, *masks = (part / image1.name for part in parts)
                truth = (flow.with_suffix(".flo"), tuple(masks)) if self.split == "train" else (None,)
                yield PairFiles(f"{scene.name}/{image1.stem}", scene.name, image1, image2, *truth)

    def _truth(self, flow: Path, beside: tuple[Path, ...], size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        expect_size(flow, vectors, size)
        invalid, hidden = (read_mask(path, size) for path in beside)
        return vectors, valid & ~invalid, hidden | leaves_image(vectors)


class Spring(FlowDataset):
    """The ground truth has twice the image's resolution in both directions; its vectors are in pixels of the image.

    As in the authors' loader, every second vector of every second row is the flow of an image pixel. The three beside
    it are ``alternatives``. Backward pairs are listed from the last frame to the first.

    :param side: camera, "left", "right" or "both".
    :param direction: "forward", "backward" or "both". The benchmark asks for both directions of both cameras.
    """

    layout = (
        "{train,test}/0001/frame_{left,right}/frame_left_0001.png, "
        "train/0001/flow_{FW,BW}_{left,right}/flow_FW_left_0001.flo5"
    )

    def __init__(
        self, name: str, root: str | Path, split: str = "train", *, side: str = "left", direction: str = "forward"
    ) -> None:
        self.sides = one_or_both("side", side, ("left", "right"))
        self.directions = one_or_both("direction", direction, ("forward", "backward"))
        super().__init__(name, root, split)

    def _find(self) -> Iterator[PairFiles]:
        for scene, side, direction in product(self._folders(self.split), self.sides, self.directions):
            backward = direction == "backward"
            kind = f"flow_{'BW' if backward else 'FW'}_{side}"
            images = self._files(scene / f"frame_{side}", f"frame_{side}_*.png")
            for first, second in self._successive(images, backward):
                file = f"{kind}_{first.stem.rsplit('_', 1)[1]}"
                flow = scene / kind / f"{file}.flo5" if self.split == "train" else None
                sequence = f"{scene.name}/{kind}"
                yield PairFiles(f"{sequence}/{file}", sequence, first, second, flow)

    def _truth(self, flow: Path, beside: tuple[Path, ...], size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        expect_size(flow, vectors, (2 * size[0], 2 * size[1]))
        corners = [(slice(row, None, 2), slice(column, None, 2)) for row in (0, 1) for column in (0, 1)]
        first, *others = (vectors[corner] for corner in corners)
        return first, np.logical_and.reduce([valid[corner] for corner in corners]), None, *others


class Kitti(FlowDataset):
    """Single pairs, frames 10 and 11. Pixels with ground truth in ``flow_occ`` but not in ``flow_noc`` are occluded."""

    layout = (
        "{training,testing}/{colored_0 (2012),image_2 (2015)}/000000_{10,11}.png, training/flow_{occ,noc}/000000_10.png"
    )
    sparse: ClassVar[bool] = True

    def _find(self) -> Iterator[PairFiles]:
        folder = self.root / ("training" if self.split == "train" else "testing")
        images = folder / ("colored_0" if self.name == "kitti-2012" else "image_2")
        for image1 in self._files(images, "*_10.png"):
            flow, visible = (folder / kind / image1.name for kind in ("flow_occ", "flow_noc"))
            truth = (flow, (visible,)) if self.split == "train" else (None,)
            yield PairFiles(image1.stem, image1.stem, image1, image1.with_name(next_name(image1.name)), *truth)

    def _truth(self, flow: Path, beside: tuple[Path, ...], size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        _, visible = read_flow(beside[0])
        expect_size(beside[0], visible, valid.shape)
        return vectors, valid, valid & ~visible


class Hd1k(FlowDataset):
    """Sequences; the test split are the pairs of frames 10 and 11 of the challenge."""

    layout = (
        "hd1k_input/image_2/000000_0000.png, hd1k_flow_gt/flow_occ/000000_0000.png, "
        "hd1k_challenge/image_2/000000_{10,11}.png"
    )
    sparse: ClassVar[bool] = True

    def _find(self) -> Iterator[PairFiles]:
        train = self.split == "train"
        images = self._files(self.root / ("hd1k_input" if train else "hd1k_challenge") / "image_2", "*_*.png")
        there = set(images)
        for image1 in images:
            image2 = image1.with_name(next_name(image1.name))
            if image2 in there:  # else image 1 is the last of its sequence
                flow = self.root / "hd1k_flow_gt" / "flow_occ" / image1.name if train else None
                yield PairFiles(image1.stem, image1.stem.split("_")[0], image1, image2, flow)


class Middlebury(FlowDataset):
    """Single pairs, frames 10 and 11, of the scenes with public ground truth (train) or of the evaluation (test)."""

    layout = "other-data/SCENE/frame{10,11}.png, other-gt-flow/SCENE/flow10.flo, eval-data/SCENE/frame{10,11}.png"

    def _find(self) -> Iterator[PairFiles]:
        train = self.split == "train"
        for scene in self._folders("other-gt-flow" if train else "eval-data"):
            images = self.root / ("other-data" if train else "eval-data") / scene.name
            flow = scene / "flow10.flo" if train else None
            yield PairFiles(scene.name, scene.name, images / "frame10.png", images / "frame11.png", flow)


DATASETS: dict[str, Callable[..., FlowDataset]] = {
    "chairs": FlyingChairs, "things-clean": FlyingThings3D, "things-final": FlyingThings3D, "sintel-clean": Sintel,
    "sintel-final": Sintel, "kitti-2012": Kitti, "kitti-2015": Kitti, "hd1k": Hd1k, "spring": Spring,
    "middlebury": Middlebury,
}  # fmt: skip
"""Name of a data set to what opens it: called with name, root, split and the data set's own options."""


def open_dataset(name: str, root: str | Path, split: str = "train", **options: Any) -> FlowDataset:
    """The pairs of a data set, one of ``DATASETS``.

    :param root: the folder that docs/datasets.md names.
    :param split: "train", and "test" or "val" where the data set has them.
    :raises ValueError: for an unknown name, split or option value.
    :raises FileNotFoundError: naming the first file or folder that is missing.
    """
    check_name(name, DATASETS)
    return DATASETS[name](name, root, split, **options)


def check_name(name: str, known: Collection[str]) -> None:
    """``ValueError`` if the name of a data set is not among the known ones."""
    if name not in known:
        raise ValueError(f"unknown data set {name!r}{did_you_mean(name, known)}: there are {', '.join(known)}")
