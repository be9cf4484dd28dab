# SPDX-License-Identifier: Apache-2.0
"""Data sets of rendered pictures, whose flow is that of the renderer.

FlyingChairs (Dosovitskiy et al., "FlowNet", ICCV 2015) and FlyingThings3D (Mayer et al., "A Large Dataset to Train
Convolutional Networks for Disparity, Optical Flow, and Scene Flow Estimation", CVPR 2016). MPI-Sintel (Butler et al.,
"A naturalistic open source movie for optical flow evaluation", ECCV 2012). Spring (Mehl et al., "Spring: A
High-Resolution High-Detail Dataset and Benchmark for Scene Flow, Optical Flow and Stereo", CVPR 2023). TartanAir (Wang
et al., "TartanAir: A Dataset to Push the Limits of Visual SLAM", IROS 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.flow_files import read_flow
from training.datasets.base import (
    FlowDataset,
    PairFiles,
    Truth,
    expect_size,
    leaves_image,
    one_or_both,
    read_image,
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
        for number, line in enumerate(lines, 1):
            if line == wanted:
                files = [folder / f"{number:05d}_{part}" for part in ("img1.ppm", "img2.ppm", "flow.flo")]
                yield PairFiles(f"{number:05d}", f"{number:05d}", *files)


class FlyingThings3D(FlowDataset):
    """One pass, clean or final. Pairs into the past are listed from the last frame to the first.

    :param render_pass: "clean" or "final".
    :param side: camera, "left", "right" or "both".
    :param direction: "into_future", "into_past" or "both".
    :param unused: the data set's own list of frames too difficult to be of use, ``all_unused_files.txt``, with lines
        like ``TRAIN/A/0004/left/0006.png``; pairs with one of these are left out.
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

    def _pairs(self, clip: str, side: str, direction: str, frames: list[tuple[Path, Path]]) -> Iterator[PairFiles]:
        folder = self.root / "optical_flow" / clip / direction / side
        past = direction == "into_past"
        kind = "IntoPast" if past else "IntoFuture"
        for first, second in ((b, a) for a, b in reversed(frames)) if past else frames:
            if any(f"{clip}/{side}/{image.name}" in self.unused for image in (first, second)):
                continue
            flow = folder / f"OpticalFlow{kind}_{first.stem}_{side[0].upper()}.pfm"
            sequence = f"{clip}/{direction}/{side}"
            yield PairFiles(f"{sequence}/{first.stem}", sequence, first, second, flow)


class Sintel(FlowDataset):
    """One pass, clean or final. Invalid pixels are those of the masks ``invalid``.

    Occluded pixels, "unmatched" on the leaderboard, are those of the masks ``occlusions`` and those that leave the
    image: the masks alone do not mark these.

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
            for image1, image2 in self._successive(self._files(scene, "frame_*.png")):
                flow = self._part(image1, "flow", ".flo") if half == "training" else None
                yield PairFiles(f"{scene.name}/{image1.stem}", scene.name, image1, image2, flow)

    def _part(self, image: Path, kind: str, suffix: str = ".png") -> Path:
        return self.root / "training" / kind / image.parent.name / f"{image.stem}{suffix}"

    def _beside(self, files: PairFiles) -> list[Path]:
        return [self._part(files.image1, kind) for kind in ("occlusions", "invalid")] if files.flow else []

    def _truth(self, files: PairFiles, flow: Path, size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        expect_size(flow, vectors, size)
        invalid, hidden = (read_mask(self._part(files.image1, kind), size) for kind in ("invalid", "occlusions"))
        return Truth(vectors, valid & ~invalid, hidden | leaves_image(vectors))


class Spring(FlowDataset):
    """Backward pairs are listed from the last frame to the first.

    The ground truth has twice the image's resolution in both directions; its vectors are in pixels of the image. As in
    the authors' loader, every second vector of every second row is the flow of an image pixel. The three beside it are
    ``alternatives``: the benchmark takes the least of the four errors, where all four are known.

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

    def _pairs(self, scene: Path, side: str, direction: str, frames: list[tuple[Path, Path]]) -> Iterator[PairFiles]:
        backward = direction == "backward"
        kind = f"flow_{'BW' if backward else 'FW'}_{side}"
        for first, second in ((b, a) for a, b in reversed(frames)) if backward else frames:
            file = f"{kind}_{first.stem.rsplit('_', 1)[1]}"
            flow = scene / kind / f"{file}.flo5" if self.split == "train" else None
            yield PairFiles(f"{scene.name}/{kind}/{file}", f"{scene.name}/{kind}", first, second, flow)

    def _beside(self, files: PairFiles) -> list[Path]:
        return [_unmatched(files.flow)] if self.occlusion and files.flow else []

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


class TartanAir(FlowDataset):
    """Left camera. The flow is computed from depth and camera motion, so it holds only where the mask is 0.

    Elsewhere the scene point is hidden (1, 10) or outside or behind the camera (100), or it belongs to something that
    moves by itself (data_type.md of the data set's tools): these pixels are not valid, and occluded.
    """

    layout = (
        "ENVIRONMENT/{Easy,Hard}/P000/{image_left/000000_left.png,flow/000000_000001_flow.npy,"
        "flow/000000_000001_mask.npy}, the same one folder deeper as the archives unpack"
    )
    splits: ClassVar[tuple[str, ...]] = ("train",)

    def _find(self) -> Iterator[PairFiles]:
        levels = ("*/Easy/P*", "*/Hard/P*", "*/*/Easy/P*", "*/*/Hard/P*")
        for trajectory in sorted(path for level in levels for path in self.root.glob(level)):
            sequence = trajectory.relative_to(self.root).as_posix()
            for image1, image2 in self._successive(self._files(trajectory / "image_left", "*_left.png")):
                frame, following = (image.stem.removesuffix("_left") for image in (image1, image2))
                flow = trajectory / "flow" / f"{frame}_{following}_flow.npy"
                yield PairFiles(f"{sequence}/{frame}", sequence, image1, image2, flow)

    def _beside(self, files: PairFiles) -> list[Path]:
        return [_mask(files.flow)] if files.flow else []

    def _truth(self, files: PairFiles, flow: Path, size: tuple[int, int]) -> Truth:
        vectors = _load(flow, (*size, 2), "f").astype(np.float32)
        mask = _load(_mask(flow), size, "u")
        return Truth(vectors, (mask == 0) & np.isfinite(vectors).all(axis=2), mask > 0)


def _mask(flow: Path) -> Path:
    return flow.with_name(flow.name.replace("_flow.npy", "_mask.npy"))


def _load(path: Path, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """An array of that shape and kind of numbers, as numpy names it; mapped, so that a header cannot ask for memory."""
    try:
        array = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read as a .npy file: {error}") from error
    if array.shape != shape or array.dtype.kind != kind:
        raise MediaError(
            f"{path}: expected numbers of kind {kind!r} and shape {shape}, got {array.dtype} of shape {array.shape}"
        )
    return array
