# SPDX-License-Identifier: Apache-2.0
"""Spring: Mehl et al., "Spring: A High-Resolution High-Detail Dataset and Benchmark for Scene Flow, Optical Flow and
Stereo", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deq_flow_ros.recordings.flow_files import read_flow

from .base import FlowDataset, PairFiles, Truth, expect_size, one_or_both, read_image


class Spring(FlowDataset):
    """Backward pairs are listed from the last frame to the first.

    The ground truth has twice the image's resolution in both directions; its vectors are in pixels of the image. As in
    the authors' loader, every second vector of every second row is the flow of an image pixel. The three beside it are
    `alternatives`: the benchmark takes the least of the four errors, where all four are known.

    :param side: camera, "left", "right" or "both".
    :param direction: "forward", "backward" or "both". The benchmark asks for both directions of both cameras.
    :param occlusion: read the maps of unmatched pixels too, which are an archive of their own; without them nothing is
        known to be occluded. Unmatched is what is red or green in them.
    """

    layout = (
        "{train,test}/0001/frame_{left,right}/frame_left_0001.png, "
        "train/0001/flow_{FW,BW}_{left,right}/flow_FW_left_0001.flo5, and for occlusion "
        "train/0001/maps/matchmap_flow_{FW,BW}_{left,right}/matchmap_flow_FW_left_0001.png"
    )

    def __init__(
        self, name: str, root: str | Path, split: str = "train", *, side: str = "left", direction: str = "forward",
        occlusion: bool = False,
    ) -> None:  # fmt: skip
        self.sides = one_or_both("side", side, ("left", "right"))
        self.directions = one_or_both("direction", direction, ("forward", "backward"))
        self.occlusion = occlusion
        super().__init__(name, root, split)

    def _find(self) -> Iterator[PairFiles]:
        for scene in self._folders(self.split):
            for side in self.sides:
                frames = list(self._successive(self._files(scene / f"frame_{side}", f"frame_{side}_*.png")))
                for direction in self.directions:
                    yield from self._pairs(scene, side, direction, frames)

    def _pairs(self, scene: Path, side: str, direction: str, frames: list[tuple[Path, Path]]) -> list[PairFiles]:
        backward = direction == "backward"
        kind = f"flow_{'BW' if backward else 'FW'}_{side}"
        pairs = []
        for first, second in ((b, a) for a, b in reversed(frames)) if backward else frames:
            file = f"{kind}_{first.stem.rsplit('_', 1)[1]}"
            flow = scene / kind / f"{file}.flo5" if self.split == "train" else None
            pairs.append(PairFiles(f"{scene.name}/{kind}/{file}", f"{scene.name}/{kind}", first, second, flow))
        flows = [files.flow for files in pairs if files.flow]
        self._require(flows)
        if self.occlusion:
            self._require(_unmatched(flow) for flow in flows)
        return pairs

    def _truth(self, files: PairFiles, flow: Path, size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        expect_size(flow, vectors, (2 * size[0], 2 * size[1]))
        corners = [(slice(row, None, 2), slice(column, None, 2)) for row in (0, 1) for column in (0, 1)]
        first, *others = (vectors[corner] for corner in corners)
        known = np.logical_and.reduce([valid[corner] for corner in corners])
        occluded = None
        if self.occlusion:
            unmatched = read_image(_unmatched(flow))
            expect_size(_unmatched(flow), unmatched, size)
            occluded = (unmatched[:, :, 0] > 0) | (unmatched[:, :, 1] > 0)
        return Truth(first, known, occluded, tuple(others))


def _unmatched(flow: Path) -> Path:
    return flow.parents[1] / "maps" / f"matchmap_{flow.parent.name}" / f"matchmap_{flow.stem}.png"
