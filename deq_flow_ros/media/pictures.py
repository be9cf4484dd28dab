# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: values as heat, errors of a flow side by side, files and `data:` addresses."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.media.colour import flow_to_color
from deq_flow_ros.media.frame import MediaError

GAP = 4
"""Width in px of the white line between two pictures."""


def heat(values: np.ndarray, top: float) -> np.ndarray:
    """(H, W, 3) uint8 RGB of values (H, W): black is 0 or no value, yellow-white `top` and more."""
    scaled = np.clip(np.nan_to_num(values.astype(np.float32)) / max(top, 1e-6), 0, 1)
    colored = cv2.applyColorMap((255 * scaled).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(colored, cv2.COLOR_BGR2RGB)


def error_strip(image: np.ndarray, truth: np.ndarray, valid: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """How wrong a flow is, uint8 RGB: image, true flow, flow, endpoint error, side by side; wide ones in one column.

    `image` (H, W, 3) uint8 RGB, both flows (H, W, 2) px in one colour scale, `valid` (H, W) bool: black where nothing
    is known. White in the error is its 99th percentile, at least 3 px.
    """
    known = np.where(valid[:, :, None], truth, np.nan)
    error = np.where(valid, np.hypot(*np.moveaxis(flow - truth, 2, 0)), np.nan)
    if valid.any():
        max_px = max(1.0, float(np.percentile(np.hypot(*truth[valid].T), 99)))
        worst_px = max(3.0, float(np.percentile(error[valid], 99)))
    else:
        max_px = worst_px = 1.0
    pictures = [image, flow_to_color(known, max_px), flow_to_color(flow, max_px), heat(error, worst_px)]
    axis = 0 if image.shape[1] > 2 * image.shape[0] else 1
    line = np.full((GAP, image.shape[1], 3) if axis == 0 else (image.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, line)][:-1], axis)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture (H, W, 3) uint8, in the format that its name says. Raises `MediaError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise MediaError(f"cannot write {path}")


def data_uri(picture: np.ndarray, quality: int = 85) -> str:
    """An RGB picture as a JPEG inside a `data:` address."""
    done, coded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise MediaError(f"cannot encode a picture of shape {picture.shape} as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode()
