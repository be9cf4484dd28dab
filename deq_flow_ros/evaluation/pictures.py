# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: the panels of the report, and the video of image and flow side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.evaluation.gallery import Gallery, Preview
from deq_flow_ros.media.colour import flow_to_color
from deq_flow_ros.media.frame import MediaError
from deq_flow_ros.media.pictures import GAP, heat

CODECS = ("vp09", "mp4v")
"""In the order of preference: browsers play the first, every build of OpenCV with FFmpeg has the second."""
MAX_VIDEO_FRAMES = 100
"""More previews go into the video with every second, third, ... only: VP9 takes up to 0.1 s a frame."""
SLOWEST_FPS = 4.0
"""A video that would show fewer pictures a second is sped up to that."""
SAMPLED = 20
"""So many pictures tell how fast the stream and how large its motion is."""


def color_range(previews: Sequence[Preview]) -> float:
    """Speed in px that gets the full colour in these pictures: the 95th percentile of flow and truth, at least 1 px."""
    fields = [field for preview in previews for field in (preview.flow, preview.truth) if field is not None]
    speeds = [np.hypot(*np.moveaxis(field[::4, ::4].astype(np.float32), 2, 0)).ravel() for field in fields]
    finite = np.concatenate(speeds) if speeds else np.zeros(0)
    finite = finite[np.isfinite(finite)]
    return max(1.0, float(np.percentile(finite, 95))) if finite.size else 1.0


def top(values: np.ndarray | None, least: float) -> float:
    """What is white in a picture of these values: their 99th percentile, at least `least`."""
    known = np.zeros(0) if values is None else values.astype(np.float32).ravel()
    finite = known[np.isfinite(known)]
    return max(least, float(np.percentile(finite, 99))) if finite.size else least


def panels(preview: Preview, max_px: float, residual_px: float, grey_levels: float) -> list[tuple[str, np.ndarray]]:
    """(name, picture (h, w, 3) uint8 RGB) of image, flow, true flow if there is any, residual, photometric error.

    `max_px` gets the full colour in the flow, `residual_px` and `grey_levels` are white in the other two.
    """
    shown = [("image", preview.image), ("flow", flow_picture(preview, max_px))]
    if preview.truth is not None:
        shown.append(("true flow", flow_to_color(preview.truth.astype(np.float32), max_px)))
    if preview.residual is not None:
        shown.append(("residual", heat(preview.residual, residual_px)))
    return [*shown, ("photometric error", heat(preview.photometric, grey_levels))]


def flow_picture(preview: Preview, max_px: float) -> np.ndarray:
    """(h, w, 3) uint8 RGB."""
    return flow_to_color(preview.flow.astype(np.float32), max_px)


def colour_wheel(side: int = 96) -> np.ndarray:
    """The key of the flow colours, (side, side, 3) uint8 RGB: what a vector from the middle to a place looks like."""
    steps = np.linspace(-1, 1, side, dtype=np.float32)
    vectors = np.dstack(np.meshgrid(steps, steps))
    vectors[np.hypot(*np.moveaxis(vectors, 2, 0)) > 1] = 0
    return flow_to_color(vectors, 1.0)


def write_video(path: Path, gallery: Gallery) -> str:
    """Image and flow of the evenly spread previews side by side, as fast as the stream; returns the codec used.

    Frames of another size than the first one's are resized to it. Raises `MediaError` where there is no flow, or OpenCV
    has no encoder.
    """
    shown = gallery.indices()
    if not shown:
        raise MediaError("there is no flow to make a video of")
    shown = shown[:: -(-len(shown) // MAX_VIDEO_FRAMES)]
    apart = -(-len(shown) // SAMPLED)
    sampled = [gallery.preview(index) for index in shown[::apart]]
    max_px = color_range(sampled)
    period_ns = (
        float(np.median(np.diff([preview.stamp_ns for preview in sampled]))) / apart if len(sampled) > 1 else 0.0
    )
    fps = 1e9 / period_ns if period_ns > 0 else SLOWEST_FPS
    height, width = sampled[0].image.shape[:2]
    size = (2 * width + GAP, height)
    partial = path.with_name(f".partial-{path.name}")
    writer, codec = _open_writer(partial, min(max(SLOWEST_FPS, fps), 60.0), size)
    try:
        for index in shown:
            preview = gallery.preview(index)
            line = np.full((preview.image.shape[0], GAP, 3), 255, np.uint8)
            frame = np.hstack([preview.image, line, flow_picture(preview, max_px)])
            if frame.shape[:2] != (height, size[0]):
                frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    finally:
        writer.release()
    _check_video(partial, len(shown))
    partial.replace(path)
    return codec


def _check_video(path: Path, frames: int) -> None:
    """Raises `MediaError` where a file lacks frames: OpenCV does not say that a disk is full."""
    video = cv2.VideoCapture(str(path))
    opened, found = video.isOpened(), max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    video.release()
    if not opened or 0 < found < frames:  # some readers do not know how many there are
        path.unlink(missing_ok=True)
        raise MediaError(f"cannot write {path}: {found} of {frames} frames arrived there; is the disk full?")


def _open_writer(path: Path, fps: float, size: tuple[int, int]) -> tuple[cv2.VideoWriter, str]:
    for codec in CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
        if writer.isOpened():
            return writer, codec
        writer.release()
    raise MediaError(f"cannot write {path}: is the place writable, and has OpenCV an encoder of {' or '.join(CODECS)}?")
