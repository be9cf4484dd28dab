# SPDX-License-Identifier: Apache-2.0
"""FlyingChairs (Dosovitskiy et al., "FlowNet", ICCV 2015) and FlyingThings3D (Mayer et al., "A Large Dataset to Train
Convolutional Networks for Disparity, Optical Flow, and Scene Flow Estimation", CVPR 2016).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from deq_flow_ros.recordings import MediaError

from .base import FlowDataset, PairFiles, one_or_both


class FlyingChairs(FlowDataset):
    """Single pairs. The official split file assigns pair n, by its line n, to training (1) or validation (2)."""

    layout = (
        "FlyingChairs_release/data/00001_{img1.ppm,img2.ppm,flow.flo}, and beside that folder "
        "FlyingChairs_train_val.txt, a download of its own"
    )
    splits: ClassVar[tuple[str, ...]] = ("train", "val")

    def _find(self) -> list[PairFiles]:
        folder = self._folder("FlyingChairs_release", "data")
        path = self.root / "FlyingChairs_train_val.txt"
        if not path.is_file():
            raise self._missing(path)
        lines = path.read_text(errors="replace").split()
        wrong = next((number for number, line in enumerate(lines, 1) if line not in ("1", "2")), None)
        if wrong is not None:
            raise MediaError(f"{path}: expected 1 (training) or 2 (validation) in each line, got {lines[wrong - 1]!r} "
                             f"in line {wrong}")  # fmt: skip
        beyond = folder / f"{len(lines) + 1:05d}_img1.ppm"
        if beyond.exists():
            raise MediaError(f"{path}: expected a line for each pair, got {len(lines)} lines, but there is {beyond}")
        wanted = "1" if self.split == "train" else "2"
        pairs = [
            PairFiles(pair, pair, folder / f"{pair}_img1.ppm", folder / f"{pair}_img2.ppm", folder / f"{pair}_flow.flo")
            for pair in (f"{number:05d}" for number, line in enumerate(lines, 1) if line == wanted)
        ]
        self._require(path for files in pairs for path in (files.image1, files.image2, files.flow) if path)
        return pairs


class FlyingThings3D(FlowDataset):
    """One pass, clean or final. Pairs into the past are listed from the last frame to the first.

    :param render_pass: "clean" or "final".
    :param side: camera, "left", "right" or "both".
    :param direction: "into_future", "into_past" or "both".
    :param unused: the data set's own list of frames too difficult to be of use, `all_unused_files.txt`, with lines like
        `TRAIN/A/0004/left/0006.png`; pairs with one of these are left out.
    """

    layout = (
        "{frames_cleanpass,frames_finalpass}/{TRAIN,TEST}/{A,B,C}/0000/{left,right}/0006.png, "
        "optical_flow/{TRAIN,TEST}/{A,B,C}/0000/{into_future,into_past}/{left,right}/OpticalFlowIntoFuture_0006_L.pfm"
    )

    def __init__(
        self, name: str, root: str | Path, split: str = "train", *, render_pass: str, side: str = "left",
        direction: str = "both", unused: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.render_pass = render_pass
        self.sides = one_or_both("side", side, ("left", "right"))
        self.directions = one_or_both("direction", direction, ("into_future", "into_past"))
        self.unused = frozenset(Path(unused).read_text().split()) if unused else frozenset()
        super().__init__(name, root, split)

    def _find(self) -> Iterator[PairFiles]:
        half = self.split.upper()
        frames_folder = f"frames_{self.render_pass}pass"
        for part in self._folders(frames_folder, half):
            for clip in self._folders(frames_folder, half, part.name):
                for side in self.sides:
                    frames = list(self._successive(self._files(clip / side, "*.png")))
                    for direction in self.directions:
                        yield from self._pairs(f"{half}/{part.name}/{clip.name}", side, direction, frames)

    def _pairs(self, clip: str, side: str, direction: str, frames: list[tuple[Path, Path]]) -> list[PairFiles]:
        folder = self.root / "optical_flow" / clip / direction / side
        past = direction == "into_past"
        kind = "IntoPast" if past else "IntoFuture"
        pairs = []
        for first, second in ((b, a) for a, b in reversed(frames)) if past else frames:
            if any(f"{clip}/{side}/{image.name}" in self.unused for image in (first, second)):
                continue
            flow = folder / f"OpticalFlow{kind}_{first.stem}_{side[0].upper()}.pfm"
            sequence = f"{clip}/{direction}/{side}"
            pairs.append(PairFiles(f"{sequence}/{first.stem}", sequence, first, second, flow))
        self._require(files.flow for files in pairs if files.flow)
        return pairs
