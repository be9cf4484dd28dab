# SPDX-License-Identifier: Apache-2.0
"""What all data sets share: ``Sample``, the files of a pair, reading them, saying what is missing; and lists of pairs.

A list of pairs is a JSON array of objects with ``name`` (its first component is the group), ``image1``, ``image2``,
``flow`` (any file that ``read_flow`` reads) and optionally ``invalid`` (non-zero where the ground truth does not hold);
paths are relative to the list.
"""

from __future__ import annotations

import abc
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.imaging.pictures import read_picture
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.flow_files import read_flow


@dataclass(frozen=True)
class Sample:
    """An image pair and its ground truth."""

    name: str  # begins with the name of the data set and a slash
    image1: np.ndarray  # (H, W, 3) uint8 RGB
    image2: np.ndarray
    flow: np.ndarray | None  # (H, W, 2) float32 px from image 1 to 2, 0 where it is not valid; None if it is not public
    valid: np.ndarray  # (H, W) bool, where the flow holds (nowhere without ground truth)
    occluded: np.ndarray | None  # (H, W) bool, what is hidden or outside in image 2; None if the data set does not say
    alternatives: tuple[np.ndarray, ...] = ()  # further flow fields, each as right as ``flow``; the least error counts


def to_tensor(image: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) uint8 on the device."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device)


def to_array(flow: Tensor) -> np.ndarray:
    """Flow of one pair, (1, 2, H, W), to (H, W, 2)."""
    return flow[0].permute(1, 2, 0).cpu().numpy()


@dataclass
class Clip:
    """Frames and what is known about them. B clips of T frames of H x W px."""

    images: Tensor  # (B, T, 3, H, W) float32, RGB 0..255; uint8 until they are on the device
    flow: Tensor  # (B, T - 1, 2, H, W) float32 px: frame t to t + 1, on frame t's pixels, also where occluded
    occluded: Tensor  # (B, T - 1, H, W) bool: not visible in frame t + 1, or outside it
    valid: Tensor  # (B, T - 1, H, W) bool: the flow is defined and shorter than the limit
    numbers: Tensor | None = None  # (B,) int64: which clips these are, of all that a run trains on

    def to(self, device: torch.device | str) -> Clip:
        """The clip on a device; images that were kept as bytes become float32."""
        images, flow, occluded, valid = (t.to(device) for t in (self.images, self.flow, self.occluded, self.valid))
        return Clip(images.float(), flow, occluded, valid, self.numbers)

    def first(self, count: int) -> Clip:
        """The first clips of a batch."""
        return Clip(**{name: tensor[:count] for name, tensor in vars(self).items() if tensor is not None})

    @staticmethod
    def join(clips: Sequence[Clip]) -> Clip:
        """One batch of these; numbers only if all have some."""
        known = [name for name, tensor in vars(clips[0]).items() if tensor is not None]
        return Clip(**{name: torch.cat([getattr(clip, name) for clip in clips]) for name in known})


Truth = tuple[Any, ...]
"""What a data set knows of a pair: flow, valid, occluded and any alternatives, as in ``Sample``."""


class PairFiles(NamedTuple):
    """Where the parts of a sample lie. Pairs with the same ``sequence`` follow each other in one recording."""

    name: str  # of the pair, without that of the data set
    sequence: str
    image1: Path
    image2: Path
    flow: Path | None  # None where the ground truth is not public
    beside: tuple[Path, ...] = ()  # what else is read for the ground truth


class FlowDataset(abc.ABC):
    """Pairs of one data set, read from its official folder layout; picklable, deterministic in its order.

    :raises FileNotFoundError: naming the first file that is missing, of all that will be read, and the layout.
    :raises ValueError: for an unknown split or option.
    :raises MediaError: from ``__getitem__``, for a damaged file.
    """

    layout: ClassVar[str]
    """The folders below the root, for messages."""
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    sparse: ClassVar[bool] = False
    """True where the ground truth covers only some pixels: the sparse augmentation is for these."""

    def __init__(self, name: str, root: str | Path, split: str = "train") -> None:
        self.name, self.root, self.split = name, Path(root), split
        if split not in self.splits:
            raise ValueError(f"split: expected one of {', '.join(self.splits)}, got {split!r}")
        if not self.root.is_dir():
            raise FileNotFoundError(f"the folder {self.root} of data set {name} does not exist")
        self.pairs: list[PairFiles] = list(self._find())
        if not self.pairs:
            raise self._missing(self.root, "holds no image pair")
        needed = [path for f in self.pairs for path in (f.image1, f.image2, f.flow, *f.beside) if path is not None]
        # Each folder is listed once: a question per file takes minutes on a network disk.
        folders = {path.parent for path in needed}
        there = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
        if missing := next((path for path in needed if path not in there), None):
            raise self._missing(missing)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        files = self.pairs[index]
        image1, image2 = read_image(files.image1), read_image(files.image2)
        size = image1.shape[0], image1.shape[1]
        expect_size(files.image2, image2, size)
        name = f"{self.name}/{files.name}"
        if files.flow is None:
            return Sample(name, image1, image2, None, np.zeros(size, bool), None)
        flow, valid, occluded, *alternatives = self._truth(files.flow, files.beside, size)
        expect_size(files.flow, flow, size)
        flow = np.where(valid[:, :, None], flow, np.float32(0))
        return Sample(name, image1, image2, flow, valid, occluded, tuple(alternatives))

    def sequences(self) -> list[list[int]]:
        """Indices of pairs that follow each other: image 2 of one is image 1 of the next."""
        runs = [[0]]
        for index, (before, files) in enumerate(pairwise(self.pairs), 1):
            if before.sequence == files.sequence and before.image2 == files.image1:
                runs[-1].append(index)
            else:
                runs.append([index])
        return runs

    @abc.abstractmethod
    def _find(self) -> Iterable[PairFiles]:
        """All pairs of the split, in order of time within a sequence."""

    def _truth(self, flow: Path, beside: tuple[Path, ...], size: tuple[int, int]) -> Truth:
        """Ground truth of a pair of images of ``size`` (H, W); the caller sees to the size of the flow."""
        return *read_flow(flow), None

    def _missing(self, path: Path, what: str = "is missing") -> FileNotFoundError:
        while self.root in path.parents and not path.parent.exists():
            path = path.parent
        return FileNotFoundError(f"{path} {what}. Data set {self.name} expects below {self.root}: {self.layout}")

    def _files(self, folder: Path, pattern: str) -> list[Path]:
        """The files of a folder that fit the pattern, or with "*" its folders; sorted, at least one."""
        if not folder.is_dir():
            raise self._missing(folder)
        found = sorted(path for path in folder.glob(pattern) if pattern != "*" or path.is_dir())
        if not found:
            raise self._missing(folder, f"holds no {'folder' if pattern == '*' else pattern}")
        return found

    def _folders(self, *parts: str) -> list[Path]:
        return self._files(self.root.joinpath(*parts), "*")

    def _successive(self, frames: Iterable[Path], backward: bool = False) -> list[tuple[Path, Path]]:
        """Each frame with the next, or from the last on with the one before; a number left out is a missing file."""
        pairs = list(pairwise(frames))
        for frame, following in pairs:
            if following != (expected := frame.with_name(next_name(frame.name))):
                raise self._missing(expected)
        return [(following, frame) for frame, following in reversed(pairs)] if backward else pairs


def one_or_both(option: str, value: str, allowed: tuple[str, str]) -> tuple[str, ...]:
    """The chosen ones of two, "both" being allowed as well; ValueError naming the option otherwise."""
    if value not in (*allowed, "both"):
        raise ValueError(f"{option}: expected one of {', '.join(allowed)}, both, got {value!r}")
    return allowed if value == "both" else (value,)


def next_name(name: str) -> str:
    """The file name whose last number is one higher, with as many digits."""
    return re.sub(r"\d+(?=\D*$)", lambda number: f"{int(number[0]) + 1:0{len(number[0])}d}", name)


def leaves_image(flow: np.ndarray) -> np.ndarray:
    """(H, W) bool: True where flow (H, W, 2) px points beyond the outer edge of the border pixels."""
    height, width = flow.shape[:2]
    x = flow[:, :, 0] + np.arange(width, dtype=np.float32)
    y = flow[:, :, 1] + np.arange(height, dtype=np.float32)[:, None]
    outside: np.ndarray = (x < -0.5) | (y < -0.5) | (x > width - 0.5) | (y > height - 0.5)
    return outside


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB; grey and 16-bit pictures are converted. ``MediaError`` for a missing or damaged file."""
    try:
        image, _ = read_picture(path, cv2.IMREAD_COLOR)
    except (OSError, MediaError) as error:
        raise MediaError(f"{path} cannot be read as an image: {error}") from error
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # OpenCV before 4.11, as Ubuntu's, has no IMREAD_COLOR_RGB


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, True where the picture is not black; ``MediaError`` for a bad file, or one of another size."""
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise MediaError(f"{path} cannot be read as a mask; it is missing, truncated or damaged")
    expect_size(path, mask, size)
    return mask > 0


def expect_size(path: Path, array: np.ndarray, size: tuple[int, int]) -> None:
    """MediaError, if what was read is not of that size (H, W)."""
    if array.shape[:2] != size:
        found = f"{array.shape[1]}x{array.shape[0]}"
        raise MediaError(f"{path}: expected {size[1]}x{size[0]}, to fit the other files of the pair, got {found}")


class PairGroup(FlowDataset):
    """The pairs of one group of a list, as a data set of that name."""

    layout = "the files that the list of pairs names"
    splits = ("train",)

    def __init__(self, name: str, root: Path, entries: Sequence[Mapping[str, str]]) -> None:
        self._entries = entries
        super().__init__(name, root, "train")

    def _find(self) -> Iterator[PairFiles]:
        for entry in self._entries:
            image1, image2, flow = (self.root / entry[key] for key in ("image1", "image2", "flow"))
            invalid = tuple(self.root / entry[key] for key in ("invalid",) if key in entry)
            name = entry["name"].partition("/")[2] or entry["name"]
            yield PairFiles(name, str(image1.parent), image1, image2, flow, invalid)

    def _truth(self, flow: Path, beside: tuple[Path, ...], size: tuple[int, int]) -> Truth:
        vectors, valid = read_flow(flow)
        for path in beside:
            valid = valid & ~read_mask(path, size)
        return vectors, valid, None


def open_pairs(path: str | Path) -> list[PairGroup]:
    """The groups of a list, in its order.

    :raises FileNotFoundError: naming the list, or the file that is missing.
    :raises ValueError: if the list is not as described above.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a non-empty array of pairs, got {type(entries).__name__}")
    groups: dict[str, list[Mapping[str, str]]] = {}
    for entry in entries:
        missing = {"name", "image1", "image2", "flow"} - set(entry)
        if missing:
            raise ValueError(f"pair {dict(entry)} has no {', '.join(sorted(missing))}")
        groups.setdefault(entry["name"].split("/", 1)[0], []).append(entry)
    names = Counter(entry["name"] for entry in entries)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{path}: expected each name once, got several pairs of the name {twice[0]}")
    return [PairGroup(name, path.parent, members) for name, members in groups.items()]


def read_pairs(path: str | Path) -> list[Sample]:
    """All pairs of a list, group by group; errors as ``open_pairs``, and ``MediaError`` for a damaged file."""
    return [group[index] for group in open_pairs(path) for index in range(len(group))]
