# SPDX-License-Identifier: Apache-2.0
"""Image pairs with ground truth from a list in JSON, and the endpoint error on them.

The list is an array of objects with ``name`` (its first component is the group), ``image1``, ``image2``, ``flow``
(any file that ``read_flow`` reads) and optionally ``invalid`` (non-zero where the ground truth does not hold); paths
are relative to the list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.recordings.flow_files import read_flow
from training.flow_dataset import FlowDataset, PairFiles, Sample, Truth, read_mask
from training.metrics import measure, summarise
from training.rendering import Clip

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


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
        return Truth(vectors, valid)


def _group(name: str) -> str:
    return name.split("/", 1)[0]


def open_pairs(path: str | Path) -> list[PairGroup]:
    """The groups of a list, in its order.

    :raises FileNotFoundError: naming the list, or the file that is missing.
    :raises ValueError: if the list or an entry is not as described above.
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
        groups.setdefault(_group(entry["name"]), []).append(entry)
    names = Counter(entry["name"] for entry in entries)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{path}: expected each name once, got several pairs of the name {twice[0]}")
    return [PairGroup(name, path.parent, members) for name, members in groups.items()]


def read_pairs(path: str | Path) -> list[Sample]:
    """All pairs of a list, group by group; errors as ``open_pairs``, and ``MediaError`` for a damaged file."""
    return [group[index] for group in open_pairs(path) for index in range(len(group))]


def to_tensor(image: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) uint8 on the device."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device)


def to_array(flow: torch.Tensor) -> np.ndarray:
    """Flow of one pair, (1, 2, H, W), to (H, W, 2)."""
    return flow[0].permute(1, 2, 0).cpu().numpy()


def model_flow(model: DEQFlow, iterations: int, coarse_levels: int = 0, scale: float = 1.0) -> FlowFunction:
    """The model, started cold, as a function of two images (H, W, 3) that returns flow (H, W, 2) px.

    :param scale: resolution to process at, 1 is that of the images. The model computes on cells of 8x8 pixels; enlarged
        images have more of them, for finer flow at a cost that grows with the square.
    """

    def flow(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        height, width = image1.shape[:2]
        if scale != 1.0:
            size = (round(width * scale), round(height * scale))
            image1, image2 = (cv2.resize(image, size, interpolation=cv2.INTER_CUBIC) for image in (image1, image2))
        pair = to_tensor(image1, model.device), to_tensor(image2, model.device)
        result = to_array(model(*pair, max_iterations=iterations, coarse_levels=coarse_levels).flow)
        if scale != 1.0:
            result = cv2.resize(result, (width, height), interpolation=cv2.INTER_LINEAR) / scale
        return result

    return flow


def pair_errors(pair: Sample, flow: np.ndarray) -> tuple[float, float]:
    """Mean endpoint error (px) and Fl (%: error above 3 px and above 5 % of the true length) over the valid pixels.

    :raises ValueError: if no pixel is valid.
    """
    summary = summarise([measure(flow, pair)["all"]])
    error, fl = summary["epe_px"], summary["fl_percent"]
    if error is None or fl is None:
        raise ValueError(f"{pair.name} has no pixel with valid ground truth")
    return error, fl


def group_means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of each group of named pairs, in the order of the pairs, and the mean over the groups as ``mean``."""
    groups: dict[str, list[float]] = {}
    for name, value in values:
        groups.setdefault(_group(name), []).append(value)
    means = {group: float(np.mean(v)) for group, v in groups.items()}
    return {**means, "mean": float(np.mean(list(means.values())))}


def clip_pairs(name: str, clip: Clip) -> list[Sample]:
    """The pairs of the first clip of a batch, each with its place behind the name."""
    images = np.ascontiguousarray(clip.images[0].round().byte().permute(0, 2, 3, 1).numpy())
    flows = np.ascontiguousarray(clip.flow[0].permute(0, 2, 3, 1).numpy())
    return [
        Sample(f"{name}/{t}", images[t], images[t + 1], flows[t], clip.valid[0, t].numpy(), clip.occluded[0, t].numpy())
        for t in range(len(flows))
    ]
