# SPDX-License-Identifier: Apache-2.0
"""Data sets of real pictures, whose flow was measured.

KITTI 2012 (Geiger et al., "Are we ready for autonomous driving?", CVPR 2012), KITTI 2015 (Menze and Geiger, "Object
scene flow for autonomous vehicles", CVPR 2015) and HD1K (Kondermann et al., "The HCI Benchmark Suite", CVPR Workshops
2016), which stores its flow like KITTI. Middlebury (Baker et al., "A Database and Evaluation Methodology for Optical
Flow", IJCV 2011).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from deq_flow_ros.recordings.flow_files import read_flow
from training.datasets.base import FlowDataset, PairFiles, Truth, expect_size, next_name


class Kitti(FlowDataset):
    """Single pairs, frames 10 and 11. Pixels with ground truth in ``flow_occ`` but not in ``flow_noc`` are occluded.

    :param images: folder of the images, "colored_0" in 2012 and "image_2" in 2015.
    """

    layout = (
        "{training,testing}/{colored_0 (2012),image_2 (2015)}/000000_{10,11}.png, training/flow_{occ,noc}/000000_10.png"
    )
    sparse: ClassVar[bool] = True

    def __init__(self, name: str, root: str | Path, split: str = "train", *, images: str) -> None:
        self.images = images
        super().__init__(name, root, split)

    def _find(self) -> Iterator[PairFiles]:
        half = "training" if self.split == "train" else "testing"
        folder = self.root / half
        for image1 in self._files(folder / self.images, "*_10.png"):
            image2 = image1.with_name(next_name(image1.name))
            flow = folder / "flow_occ" / image1.name if half == "training" else None
            yield PairFiles(image1.stem, image1.stem, image1, image2, flow)

    def _beside(self, files: PairFiles) -> list[Path]:
        return [_not_occluded(files.flow)] if files.flow else []

    def _truth(self, files: PairFiles, flow: Path, size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        _, visible = read_flow(_not_occluded(flow))
        expect_size(_not_occluded(flow), visible, valid.shape)
        return Truth(vectors, valid, valid & ~visible)


def _not_occluded(flow: Path) -> Path:
    return flow.parent.with_name("flow_noc") / flow.name


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
