# SPDX-License-Identifier: Apache-2.0
"""TartanAir: Wang et al., "TartanAir: A Dataset to Push the Limits of Visual SLAM", IROS 2020."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from deq_flow_ros.recordings import MediaError

from .base import FlowDataset, PairFiles, Truth


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
            pairs = []
            for image1, image2 in self._successive(self._files(trajectory / "image_left", "*_left.png")):
                frame, following = (image.stem.removesuffix("_left") for image in (image1, image2))
                flow = trajectory / "flow" / f"{frame}_{following}_flow.npy"
                pairs.append(PairFiles(f"{sequence}/{frame}", sequence, image1, image2, flow))
            flows = [files.flow for files in pairs if files.flow]
            self._require(flows)
            self._require(_mask(flow) for flow in flows)
            yield from pairs

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
