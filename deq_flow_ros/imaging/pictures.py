# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: values as a heat map, errors of a flow side by side, picture files and ``data:`` addresses."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from deq_flow_ros.imaging.colour import flow_to_color
from deq_flow_ros.imaging.frame import MediaError

GAP = 4
"""Width in px of the white line between two pictures."""
CODECS = ("vp09", "mp4v")
"""Codecs by preference: browsers play the first, and every build of OpenCV with FFmpeg has the second."""


def heat(values: np.ndarray, top: float) -> np.ndarray:
    """A heat map (H, W, 3) uint8 RGB of values (H, W): black is 0 or no value, yellow-white is ``top`` or more."""
    scaled = np.clip(np.nan_to_num(values.astype(np.float32)) / max(top, 1e-6), 0, 1)
    colored = cv2.applyColorMap((255 * scaled).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(colored, cv2.COLOR_BGR2RGB)


def top(values: np.ndarray, least: float, percentile: float = 99) -> float:
    """The value for the full colour in a picture: a percentile of the finite values, but at least ``least``."""
    known = values[np.isfinite(values)].astype(np.float32)
    return max(least, float(np.percentile(known, percentile))) if known.size else least


def error_strip(image: np.ndarray, truth: np.ndarray, valid: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """A picture, uint8 RGB, of the error of a flow: image, true flow, flow and endpoint error side by side.

    Wide images are arranged in a column. Both flows have the same colour scale. Pixels that are not valid are black.
    White in the error is its 99th percentile, but at least 3 px.

    :param image: (H, W, 3) uint8 RGB.
    :param truth: (H, W, 2) px.
    :param valid: (H, W) bool, where the true flow is known.
    :param flow: (H, W, 2) px.
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
    """Write an RGB picture (H, W, 3) uint8 in the format of the file's extension.

    :raises MediaError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise MediaError(f"cannot write {path}")


def data_uri(picture: np.ndarray, quality: int = 85) -> str:
    """An RGB picture as a JPEG in a ``data:`` address."""
    done, coded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise MediaError(f"cannot encode a picture of shape {picture.shape} as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode()


def write_video(path: Path, pictures: Iterable[np.ndarray], fps: float) -> None:
    """Write RGB pictures (H, W, 3) uint8 as an MP4 file that appears complete or not at all.

    Pictures of another size than the first are resized to it.

    :raises MediaError: if there is no picture, OpenCV has no encoder, or the disk is full.
    """
    partial = path.with_name(f".partial-{path.name}")
    writer, size, count = None, (0, 0), 0
    try:
        for picture in pictures:
            if writer is None:
                size = picture.shape[1], picture.shape[0]
                writer = _video_writer(partial, fps, size)
            writer.write(cv2.cvtColor(_of_size(picture, size), cv2.COLOR_RGB2BGR))
            count += 1
    finally:
        if writer is not None:
            writer.release()
    if not count:
        raise MediaError("there is nothing to make a video of")
    # OpenCV does not report a full disk.
    video = cv2.VideoCapture(str(partial))
    opened, found = video.isOpened(), max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    video.release()
    if not opened or 0 < found < count:  # some readers do not know how many there are
        partial.unlink(missing_ok=True)
        raise MediaError(f"cannot write {path}: {found} of {count} frames arrived there; is the disk full?")
    partial.replace(path)


def write_animation(path: Path, pictures: Iterable[np.ndarray], fps: float) -> None:
    """Write RGB pictures (H, W, 3) uint8 as an animated WebP that repeats for ever.

    Pages and READMEs show such a file like any other picture. It appears complete or not at all. Pictures of another
    size than the first are resized to it.

    :raises MediaError: if there is no picture, or the file cannot be written.
    """
    frames: list[Image.Image] = []
    for picture in pictures:
        frames.append(Image.fromarray(_of_size(picture, frames[0].size if frames else None)))
    if not frames:
        raise MediaError("there is nothing to make an animation of")
    partial = path.with_name(f".partial-{path.name}")
    try:
        frames[0].save(
            partial, "WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, quality=60
        )
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MediaError(f"cannot write {path}: {error}") from error


def _of_size(picture: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    same = size is None or picture.shape[1::-1] == size
    return picture if same else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _video_writer(path: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    for codec in CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
        if writer.isOpened():
            return writer
        writer.release()
    raise MediaError(f"cannot write {path}: is the place writable, and has OpenCV an encoder of {' or '.join(CODECS)}?")
