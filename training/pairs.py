# SPDX-License-Identifier: Apache-2.0
"""Image pairs with ground truth from a list in JSON, and the endpoint error on them.

The list is an array of objects with ``name`` (its first component is the group), ``image1``, ``image2``, ``flow``
(``.flo`` or KITTI ``.png``) and optionally ``invalid`` (non-zero where the ground truth does not hold); paths are
relative to the list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from deq_flow_ros.media.flow_files import read_flow
from deq_flow_ros.model import DEQFlow

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Pair:
    """Two images (H, W, 3) uint8 RGB, the flow (H, W, 2) float32 px between them, and where it holds (H, W) bool."""

    name: str
    image1: np.ndarray
    image2: np.ndarray
    flow: np.ndarray
    valid: np.ndarray

    @property
    def group(self) -> str:
        """The data set: the name up to its first slash."""
        return self.name.split("/", 1)[0]


def read_pairs(path: str | Path) -> list[Pair]:
    """All pairs of a list.

    :raises FileNotFoundError: naming the list, or the image that is missing.
    :raises ValueError: if the list or an entry is not as described above.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a non-empty array of pairs, got {type(entries).__name__}")
    return [_read_pair(path.parent, entry) for entry in entries]


def _read_pair(root: Path, entry: Mapping[str, str]) -> Pair:
    missing = {"name", "image1", "image2", "flow"} - set(entry)
    if missing:
        raise ValueError(f"pair {dict(entry)} has no {', '.join(sorted(missing))}")
    flow, valid = read_flow(root / entry["flow"])
    if "invalid" in entry:
        mask = cv2.imread(str(root / entry["invalid"]), cv2.IMREAD_GRAYSCALE)
        if mask is None:
            raise FileNotFoundError(f"{root / entry['invalid']} is missing or not an image")
        valid = valid & (mask == 0)
    image1, image2 = _read_image(root / entry["image1"]), _read_image(root / entry["image2"])
    if image1.shape != image2.shape or image1.shape[:2] != flow.shape[:2]:
        raise ValueError(
            f"pair {entry['name']}: images and flow must have one size, got {image1.shape[:2]}, {image2.shape[:2]} "
            f"and {flow.shape[:2]}"
        )
    return Pair(entry["name"], image1, image2, flow, valid)


def _read_image(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(f"{path} is missing or not an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def to_tensor(image: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) uint8 on the device."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(device)


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
        prediction = model(*pair, max_iterations=iterations, coarse_levels=coarse_levels)
        result = prediction.flow[0].permute(1, 2, 0).cpu().numpy()
        if scale != 1.0:
            result = cv2.resize(result, (width, height), interpolation=cv2.INTER_LINEAR) / scale
        return result

    return flow


def pair_errors(pair: Pair, flow: np.ndarray) -> tuple[float, float]:
    """Mean endpoint error (px) and Fl (%: error above 3 px and above 5 % of the true length) over the valid pixels."""
    error = np.linalg.norm(flow - pair.flow, axis=2)[pair.valid]
    length = np.linalg.norm(pair.flow, axis=2)[pair.valid]
    return float(error.mean()), float(100 * ((error > 3) & (error > 0.05 * length)).mean())


def group_means(values: Iterable[tuple[Pair, float]]) -> dict[str, float]:
    """Mean per group in the order of the pairs, and the mean over the groups as ``mean``."""
    groups: dict[str, list[float]] = {}
    for pair, value in values:
        groups.setdefault(pair.group, []).append(value)
    means = {group: float(np.mean(v)) for group, v in groups.items()}
    return {**means, "mean": float(np.mean(list(means.values())))}
