# SPDX-License-Identifier: Apache-2.0
"""MPI-Sintel: Butler et al., "A naturalistic open source movie for optical flow evaluation", ECCV 2012."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deq_flow_ros.recordings.flow_files import read_flow

from .base import FlowDataset, PairFiles, Truth, expect_size, leaves_image, read_mask


class Sintel(FlowDataset):
    """One pass, clean or final. Invalid pixels are those of the masks `invalid`.

    Occluded pixels, "unmatched" on the leaderboard, are those of the masks `occlusions` and those that leave the image:
    the masks alone do not mark these.

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
            for image1, image2 in self._successive(frames):
                flow = self._beside(image1, "flow", ".flo") if half == "training" else None
                pairs.append(PairFiles(f"{scene.name}/{image1.stem}", scene.name, image1, image2, flow))
            self._require(files.flow for files in pairs if files.flow)
            if half == "training":
                for kind in ("occlusions", "invalid"):
                    self._require(self._beside(files.image1, kind, ".png") for files in pairs)
            yield from pairs

    def _beside(self, image: Path, kind: str, suffix: str) -> Path:
        return self.root / "training" / kind / image.parent.name / f"{image.stem}{suffix}"

    def _truth(self, files: PairFiles, flow: Path, size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        expect_size(flow, vectors, size)
        invalid, hidden = (
            read_mask(self._beside(files.image1, kind, ".png"), size) for kind in ("invalid", "occlusions")
        )
        return Truth(vectors, valid & ~invalid, hidden | leaves_image(vectors))
