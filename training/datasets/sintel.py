# SPDX-License-Identifier: Apache-2.0
"""MPI-Sintel: Butler et al., "A naturalistic open source movie for optical flow evaluation", ECCV 2012."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from deq_flow_ros.media.flow_files import read_flow

from .base import FlowDataset, PairFiles, Truth, read_mask


class Sintel(FlowDataset):
    """One pass, clean or final. Invalid pixels are those of the masks `invalid`, occluded ones those of `occlusions`.

    :param render_pass: "clean" or "final".
    """

    layout = (
        "training/{clean,final}/SCENE/frame_0001.png, training/{flow,occlusions,invalid}/SCENE/frame_0001.{flo,png}, "
        "test/{clean,final}/SCENE/frame_0001.png"
    )

    def __init__(self, name: str, root: str | Path, split: str = "train", *, render_pass: str) -> None:
        self.render_pass = render_pass
        super().__init__(name, root, split)

    def _find(self) -> Iterator[PairFiles]:
        half = "training" if self.split == "train" else "test"
        for scene in self._folders(half, self.render_pass):
            frames = self._files(scene, "frame_*.png")
            pairs = []
            for image1, image2 in pairwise(frames):
                flow = self._beside(image1, "flow", ".flo") if half == "training" else None
                pairs.append(PairFiles(f"{scene.name}/{image1.stem}", scene.name, image1, image2, flow))
            self._require(files.flow for files in pairs if files.flow)
            if half == "training":
                for kind in ("occlusions", "invalid"):
                    self._require(self._beside(files.image1, kind, ".png") for files in pairs)
            yield from pairs

    def _beside(self, image: Path, kind: str, suffix: str) -> Path:
        return self.root / "training" / kind / image.parent.name / f"{image.stem}{suffix}"

    def _truth(self, files: PairFiles, flow: Path) -> Truth:
        vectors, valid = read_flow(flow)
        invalid, occluded = (read_mask(self._beside(files.image1, kind, ".png")) for kind in ("invalid", "occlusions"))
        return vectors, valid & ~invalid, occluded
