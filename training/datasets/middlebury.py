# SPDX-License-Identifier: Apache-2.0
"""Middlebury: Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011."""

from __future__ import annotations

from .base import FlowDataset, PairFiles


class Middlebury(FlowDataset):
    """Single pairs, frames 10 and 11, of the scenes with public ground truth (train) or of the evaluation (test)."""

    layout = "other-data/SCENE/frame{10,11}.png, other-gt-flow/SCENE/flow10.flo, eval-data/SCENE/frame{10,11}.png"

    def _find(self) -> list[PairFiles]:
        train = self.split == "train"
        pairs = []
        for scene in self._folders("other-gt-flow" if train else "eval-data"):
            images = self.root / ("other-data" if train else "eval-data") / scene.name
            flow = scene / "flow10.flo" if train else None
            files = PairFiles(scene.name, scene.name, images / "frame10.png", images / "frame11.png", flow)
            self._require(path for path in (files.image1, files.image2, files.flow) if path)
            pairs.append(files)
        return pairs
