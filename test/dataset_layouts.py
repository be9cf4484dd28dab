# SPDX-License-Identifier: Apache-2.0
"""Tiny data sets in the official folder layouts, with flow that is what really happens between the images.

Each `write_...(root)` makes what `open_dataset(NAME, root)` expects, all splits of it.
"""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.recordings.flow_files import write_flow

SIZE = (48, 64)
"""Height and width of all images."""


class Scene:
    """A smooth texture under a camera that turns, approaches and drifts: no two pairs of frames move alike."""

    def __init__(self, seed: int, size: tuple[int, int] = SIZE) -> None:
        rng = np.random.default_rng(seed)
        self.size = size
        height, width = size
        texture = cv2.GaussianBlur(rng.uniform(0, 1, (height + 96, width + 96, 3)), (0, 0), 4)
        low, high = texture.min(), texture.max()
        self.texture = (255 * (texture - low) / (high - low)).astype(np.float32)
        self.motion = rng.uniform(0.5, 1.5, 4) * rng.choice([-1, 1], 4)

    def camera(self, time: int) -> np.ndarray:
        """(3, 3): pixels of the frame to pixels of the texture."""
        turn, approach, right, down = self.motion * np.array([0.03, 0.02, 2.5, 1.5]) * time * (1 + 0.2 * time)
        centre_y, centre_x = (side / 2 for side in self.size)
        cos, sin = (1 + approach) * np.cos(turn), (1 + approach) * np.sin(turn)
        return np.array([
            [cos, -sin, centre_x + 48 + right - cos * centre_x + sin * centre_y],
            [sin, cos, centre_y + 48 + down - sin * centre_x - cos * centre_y],
            [0, 0, 1],
        ])  # fmt: skip

    def image(self, time: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        frame = cv2.warpAffine(self.texture, self.camera(time)[:2], self.size[::-1], flags=flags)
        return np.clip(np.rint(frame), 0, 255).astype(np.uint8)

    def flow(self, time: int, target: int, resolution: int = 1) -> np.ndarray:
        """(resolution * H, resolution * W, 2) px of the image: where the pixels of one frame lie in the other."""
        y, x = np.mgrid[: self.size[0] * resolution, : self.size[1] * resolution] / resolution
        points = np.stack([x, y, np.ones_like(x)])
        there = np.tensordot(np.linalg.inv(self.camera(target)) @ self.camera(time), points, 1)
        return (there - points)[:2].transpose(1, 2, 0).astype(np.float32)


def mean_difference(image1: np.ndarray, image2: np.ndarray, flow: np.ndarray, where: np.ndarray) -> float:
    """Mean absolute difference (grey levels) of image 1 and image 2 moved back along the flow, `where` inside."""
    height, width = flow.shape[:2]
    x, y = (np.indices((height, width)).astype(np.float32) + flow.transpose(2, 0, 1)[::-1])[::-1]
    inside = where & (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    assert inside.sum() > 0.2 * where.sum() > 0
    moved = cv2.remap(image2, x, y, cv2.INTER_CUBIC)
    return float(cv2.absdiff(moved, image1)[inside].mean())


def write_image(path: Path, image: np.ndarray) -> None:
    """(H, W, 3) RGB or (H, W), in the format of the file's name; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def _write_flow(path: Path, flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flow(path, flow, valid)


def corner_mask(size: tuple[int, int], corner: str) -> np.ndarray:
    """(H, W) uint8, 255 in a rectangle of 6x8 pixels at the "first" or the "last" corner."""
    mask = np.zeros(size, np.uint8)
    rows, columns = (slice(0, 6), slice(0, 8)) if corner == "first" else (slice(-6, None), slice(-8, None))
    mask[rows, columns] = 255
    return mask


def write_sintel(root: Path, scenes: tuple[str, ...] = ("alley_1", "market_2"), frames: int = 4,
                 size: tuple[int, int] = SIZE) -> None:  # fmt: skip
    """Invalid is the first corner (see `corner_mask`), hidden the last one. One test scene, "ambush_1"."""
    for seed, name in enumerate((*scenes, "ambush_1")):
        scene, half = Scene(seed, size), "training" if name in scenes else "test"
        for time in range(frames):
            stem = f"frame_{time + 1:04d}"
            write_image(root / half / "clean" / name / f"{stem}.png", scene.image(time))
            write_image(root / half / "final" / name / f"{stem}.png", cv2.blur(scene.image(time), (3, 3)))
            if half == "training":
                write_image(root / half / "invalid" / name / f"{stem}.png", corner_mask(size, "first"))
                if time + 1 < frames:
                    write_image(root / half / "occlusions" / name / f"{stem}.png", corner_mask(size, "last"))
                    _write_flow(root / half / "flow" / name / f"{stem}.flo", scene.flow(time, time + 1))


def write_chairs(root: Path, splits: str = "1121", size: tuple[int, int] = SIZE) -> None:
    """A pair for each character: 1 for training, 2 for validation."""
    data = root / "FlyingChairs_release" / "data"
    for number in range(1, len(splits) + 1):
        scene = Scene(number, size)
        write_image(data / f"{number:05d}_img1.ppm", scene.image(0))
        write_image(data / f"{number:05d}_img2.ppm", scene.image(1))
        _write_flow(data / f"{number:05d}_flow.flo", scene.flow(0, 1))
    (root / "FlyingChairs_train_val.txt").write_text("\n".join(splits) + "\n")


def write_things(root: Path, clips: tuple[str, ...] = ("TRAIN/A/0000", "TRAIN/C/0004", "TEST/B/0001"), frames: int = 3,
                 size: tuple[int, int] = SIZE) -> None:  # fmt: skip
    """Frames from 0006 on. The flow of the first frame into the past and of the last into the future is there too."""
    for seed, clip in enumerate(clips):
        for side in ("left", "right"):
            scene = Scene(2 * seed + (side == "right"), size)
            for time in range(frames):
                number = f"{time + 6:04d}"
                for folder in ("frames_cleanpass", "frames_finalpass"):
                    write_image(root / folder / clip / side / f"{number}.png", scene.image(time))
                for direction, kind, step in (("into_future", "IntoFuture", 1), ("into_past", "IntoPast", -1)):
                    file = f"OpticalFlow{kind}_{number}_{side[0].upper()}.pfm"
                    flow = scene.flow(time, time + step)
                    flow[3, 5] = np.nan  # such frames exist
                    _write_flow(root / "optical_flow" / clip / direction / side / file, flow)


def write_kitti(root: Path, year: int = 2015, pairs: int = 2, size: tuple[int, int] = SIZE) -> None:
    """Ground truth at two thirds of the pixels, of which nine in ten are not occluded."""
    images = "colored_0" if year == 2012 else "image_2"
    for half in ("training", "testing"):
        for number in range(pairs):
            rng, scene = np.random.default_rng(number), Scene(number + (10 if half == "testing" else 0), size)
            for time in (0, 1):
                write_image(root / half / images / f"{number:06d}_{10 + time}.png", scene.image(time))
            if half == "training":
                known = rng.random(size) < 2 / 3
                visible = known & (rng.random(size) < 0.9)
                _write_flow(root / half / "flow_occ" / f"{number:06d}_10.png", scene.flow(0, 1), known)
                _write_flow(root / half / "flow_noc" / f"{number:06d}_10.png", scene.flow(0, 1), visible)


def write_hd1k(root: Path, sequences: int = 2, frames: int = 3, size: tuple[int, int] = SIZE) -> None:
    """Sequences of `frames` images; the challenge has one pair."""
    for number in range(sequences):
        rng, scene = np.random.default_rng(number), Scene(number, size)
        for time in range(frames):
            file = f"{number:06d}_{time:04d}.png"
            write_image(root / "hd1k_input" / "image_2" / file, scene.image(time))
            if time + 1 < frames:
                known = rng.random(size) < 0.5
                _write_flow(root / "hd1k_flow_gt" / "flow_occ" / file, scene.flow(time, time + 1), known)
    for time in (0, 1):
        write_image(root / "hd1k_challenge" / "image_2" / f"000000_{10 + time}.png", Scene(10, size).image(time))


def write_spring(root: Path, scenes: tuple[str, ...] = ("0001", "0002"), frames: int = 3,
                 size: tuple[int, int] = SIZE) -> None:  # fmt: skip
    """Flow at twice the resolution of the images; one of four vectors of one pixel is unknown. Test: "0003"."""
    for seed, name in enumerate((*scenes, "0003")):
        half = "train" if name in scenes else "test"
        for side in ("left", "right"):
            scene = Scene(2 * seed + (side == "right"), size)
            for time in range(frames):
                write_image(
                    root / half / name / f"frame_{side}" / f"frame_{side}_{time + 1:04d}.png", scene.image(time)
                )
                for kind, target in (("FW", time + 1), ("BW", time - 1)):
                    if half == "train" and 0 <= target < frames:
                        flow = scene.flow(time, target, resolution=2)
                        flow[7, 11] = np.nan
                        folder = f"flow_{kind}_{side}"
                        stem = f"{folder}_{time + 1:04d}"
                        _write_flow(root / half / name / folder / f"{stem}.flo5", flow)


def write_middlebury(root: Path, scenes: tuple[str, ...] = ("Grove2", "Venus"), size: tuple[int, int] = SIZE) -> None:
    """ "Walking" has images but no public ground truth; "Army" is of the evaluation."""
    for seed, name in enumerate((*scenes, "Walking", "Army")):
        scene, folder = Scene(seed, size), "eval-data" if name == "Army" else "other-data"
        for time in (0, 1):
            write_image(root / folder / name / f"frame{10 + time}.png", scene.image(time))
        if name in scenes:
            _write_flow(root / "other-gt-flow" / name / "flow10.flo", scene.flow(0, 1))


WRITERS: dict[str, Callable[[Path], None]] = {
    "chairs": write_chairs,
    "things-clean": write_things,
    "things-final": write_things,
    "sintel-clean": write_sintel,
    "sintel-final": write_sintel,
    "kitti-2012": lambda root: write_kitti(root, 2012),
    "kitti-2015": write_kitti,
    "hd1k": write_hd1k,
    "spring": write_spring,
    "middlebury": write_middlebury,
}
"""What writes each data set of ``training.datasets``, by its name."""
