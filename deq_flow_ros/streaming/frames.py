# SPDX-License-Identifier: Apache-2.0
"""Images at the scale at which they are processed, encoded; and fields back at the images' own resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.model import FACTOR, DEQFlow, Encoding, pad_to_multiple
from deq_flow_ros.model.deq_flow import MIN_SIDE
from deq_flow_ros.streaming.costs import StageClock, scaled_size


@dataclass(frozen=True)
class EncodedImage:
    """An image and all that it contributes to a pair.

    :ivar image: (H, W, 3) uint8 RGB, as it came.
    :ivar scale: at which it was processed.
    :ivar pixels: how many were processed.
    :ivar tensor: (1, 3, h, w) float32, what was encoded: scaled, padded.
    :ivar padding: how much of it is padding, for ``crop``.
    """

    image: np.ndarray
    scale: float
    pixels: int
    tensor: Tensor
    padding: tuple[int, int, int, int]
    encoding: Encoding


def encode_images(model: DEQFlow, images: Sequence[np.ndarray], scale: float, clock: StageClock) -> list[EncodedImage]:
    """Scale and encode images, (H, W, 3) uint8 RGB each, as one batch; their ``processed_size`` must be the same."""
    resized, padded = [], []
    for image in images:
        height, width = image.shape[:2]
        size = scaled_size(height, width, scale)
        if size != (height, width):
            with clock.stage("resize"):
                interpolation = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
                image = cv2.resize(image, (size[1], size[0]), interpolation=interpolation)
        resized.append(image)
    with clock.stage("encode"):
        for image in resized:
            # (H, W, 3) seen as (1, 3, H, W) already is the channels_last layout that the convolutions want.
            tensor = torch.from_numpy(np.ascontiguousarray(image)).to(model.device)
            padded.append(pad_to_multiple(tensor.permute(2, 0, 1)[None].float()))
        encoding = model.encode(joined([tensor for tensor, _ in padded]))
    return [
        EncodedImage(image, scale, scaled.shape[0] * scaled.shape[1], tensor, padding, Encoding(*sample(encoding, i)))
        for i, (image, scaled, (tensor, padding)) in enumerate(zip(images, resized, padded, strict=True))
    ]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) as one (B, ...); of one tensor itself, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def sample(batch: Sequence[Tensor], index: int) -> tuple[Tensor, ...]:
    """One sample, (1, ...), of tensors (B, ...)."""
    return tuple(tensor[index : index + 1] for tensor in batch)


def processed_size(frame: np.ndarray, scale: float) -> tuple[int, int]:
    """(H, W) of what is encoded of a frame (H, W, 3) at a scale, padding included."""
    height, width = scaled_size(frame.shape[0], frame.shape[1], scale)
    return height + -height % FACTOR, width + -width % FACTOR


def resize_field(field: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A flow (h, w, 2) or residual (h, w), in pixels of its own resolution, at another resolution in pixels of that."""
    height, width = field.shape[:2]
    if (height, width) == size:
        return np.ascontiguousarray(field)
    smaller = size[0] * size[1] < height * width
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    resized = cv2.resize(field, (size[1], size[0]), interpolation=interpolation)
    ratio = np.array([size[1] / width, size[0] / height], np.float32)
    return resized * (ratio if field.ndim == 3 else ratio.mean())


def check_frame(frame: np.ndarray) -> None:
    """Refuse what is not a frame (H, W, 3) uint8 of at least 16x16.

    :raises ValueError: saying what was expected and got.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"a frame must be a uint8 array of shape (H, W, 3), got {got}")
    if min(frame.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"a frame must be at least {MIN_SIDE}x{MIN_SIDE} pixels, got {frame.shape[1]}x{frame.shape[0]}"
        )
