# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: the strips of the report and the video of image and flow side by side."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.media.analysis import Preview, Strip
from deq_flow_ros.media.colour import flow_to_color
from deq_flow_ros.media.frame import MediaError

GAP = 4
"""Width in px of the white line between two pictures."""
CODECS = ("vp09", "mp4v")
"""In the order of preference: browsers play the first, every build of OpenCV with FFmpeg has the second."""
MAX_VIDEO_FRAMES = 100
"""More previews go into the video with every second, third, ... only: VP9 takes up to 0.1 s a frame."""


def color_range(previews: Sequence[Preview]) -> float:
    """Speed in px that gets the full colour in these pictures: the 99th percentile of flow and, in strips, exact flow,
    at least 1 px.
    """
    fields = [preview.flow for preview in previews]
    fields += [preview.exact for preview in previews if isinstance(preview, Strip) and preview.exact is not None]
    speeds = [np.hypot(*np.moveaxis(field[::4, ::4].astype(np.float32), 2, 0)).ravel() for field in fields]
    finite = np.concatenate(speeds) if speeds else np.zeros(0)
    finite = finite[np.isfinite(finite)]
    return max(1.0, float(np.percentile(finite, 99))) if finite.size else 1.0


def strip(preview: Strip, max_px: float, residual_px: float, grey_levels: float) -> list[np.ndarray]:
    """The pictures of one pair, each (h, w, 3) uint8 RGB: image, flow, exact flow if there is one, residual, error.

    White in the residual is `residual_px` and more, in the photometric error `grey_levels` and more; black is no value.
    """
    pictures = [preview.image, flow_to_color(preview.flow.astype(np.float32), max_px)]
    if preview.exact is not None:
        pictures.append(flow_to_color(preview.exact.astype(np.float32), max_px))
    return [*pictures, heat(preview.residual, residual_px), heat(preview.photometric, grey_levels)]


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


def write_video(path: Path, previews: Sequence[Preview], fps: float, max_px: float) -> str:
    """Image and flow side by side, `fps` previews a second; returns the codec used.

    A video that would show less than one picture a second is sped up to that.

    Frames of another size than the first one's are resized to it. Raises `MediaError` where OpenCV has no encoder.
    """
    if not previews:
        raise MediaError("there is no flow to make a video of")
    step = -(-len(previews) // MAX_VIDEO_FRAMES)
    height, width = previews[0].image.shape[:2]
    size = (2 * width + GAP, height)
    writer, codec = _open_writer(path, max(1.0, fps / step), size)
    try:
        for preview in previews[::step]:
            color = flow_to_color(preview.flow.astype(np.float32), max_px)
            line = np.full((preview.image.shape[0], GAP, 3), 255, np.uint8)
            frame = np.hstack([preview.image, line, color])
            if frame.shape[:2] != (height, size[0]):
                frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    finally:
        writer.release()
    return codec


def _open_writer(path: Path, fps: float, size: tuple[int, int]) -> tuple[cv2.VideoWriter, str]:
    for codec in CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
        if writer.isOpened():
            return writer, codec
        writer.release()
    raise MediaError(f"cannot write {path}: is the place writable, and has OpenCV an encoder of {' or '.join(CODECS)}?")
