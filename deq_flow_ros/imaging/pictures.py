# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: flow as colour, values as a heat map, errors side by side; files of pictures and videos.

The colour wheel is that of Baker et al., "A Database and Evaluation Methodology for Optical Flow", 2011: the hue is the
direction, the saturation the length. Its 55 hues are spaced so that the eye tells neighbours apart (15 red-yellow, 6
yellow-green, 4 green-cyan, 11 cyan-blue, 13 blue-magenta, 6 magenta-red).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from deq_flow_ros.host import replacing
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.imaging.encodings import encode_image, open_ended

TABLE_RADIUS = 255
"""The number of steps from no motion to the largest motion in the table of colours."""
CODECS = ("vp09", "mp4v")  # browsers play the first, and every build of OpenCV with FFmpeg has the second


def flow_to_color(flow: np.ndarray, max_px: float | None = None) -> np.ndarray:
    """Draw flow (H, W, 2) px as colour, (H, W, 3) uint8 RGB. White is no motion, black is no flow (NaN or infinite).

    :param max_px: the length with full saturation; longer vectors are darker. None takes the longest finite vector of
        this field, but at least 1 px, so that noise around zero stays pale.
    :raises ValueError: for another shape, or a ``max_px`` that is not above 0.
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"expected flow of shape (H, W, 2), got {flow.shape}")
    if max_px is not None and not max_px > 0:
        raise ValueError(f"expected max_px above 0, got {max_px}")
    flow = np.ascontiguousarray(flow, np.float32)
    if flow.size == 0:
        return np.zeros((*flow.shape[:2], 3), np.uint8)
    u, v = cv2.split(flow)
    speed = cv2.magnitude(u, v)
    finite = np.isfinite(speed)
    if max_px is None:
        max_px = max(1.0, float(speed.max(initial=0.0, where=finite)))
    scale = np.float32(TABLE_RADIUS / max_px)
    # Vectors beyond max_px would leave the disc. They are pulled back to its rim, which has darker colours.
    pull = scale * np.minimum(1.0, (TABLE_RADIUS + 2.0) / np.maximum(speed * scale, 1e-6)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        columns, rows = (np.where(finite, part * pull, 0).astype(np.int32) + (TABLE_RADIUS + 2) for part in (u, v))
    index = rows * (2 * TABLE_RADIUS + 5) + columns
    color = color_table().take(index.ravel(), axis=0).reshape(*flow.shape[:2], 3)
    if not finite.all():
        color[~finite] = 0
    return color


@cache
def color_table() -> np.ndarray:
    """The colours of all vectors in steps of 1 / r of the largest one, ((2 r + 5)^2, 3) uint8 RGB, with a rim for
    longer ones.
    """
    # Between two pure hues of the wheel, one channel goes up or down.
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], np.float32)
    places = np.concatenate([n + np.arange(count) / count for n, count in enumerate((15, 6, 4, 11, 13, 6))])
    wheel = np.stack([np.interp(places, range(7), channel) for channel in corners.T], axis=1).astype(np.float32)
    steps = np.arange(-TABLE_RADIUS - 2, TABLE_RADIUS + 3, dtype=np.float32) / TABLE_RADIUS
    v, u = np.meshgrid(steps, steps, indexing="ij")
    radius = np.hypot(u, v)
    position = (np.arctan2(-v, -u) / np.pi + 1.0) / 2.0 * (len(wheel) - 1)
    lower = np.floor(position).astype(int)
    fraction = (position - lower)[..., None]
    hue = (1 - fraction) * wheel[lower % len(wheel)] + fraction * wheel[(lower + 1) % len(wheel)]
    inside = (radius <= 1.0)[..., None]
    color = np.where(inside, 1.0 - radius[..., None] * (1.0 - hue), hue * 0.75)
    return np.ascontiguousarray(np.floor(255.0 * color).astype(np.uint8).reshape(-1, 3))


def heat(values: np.ndarray, top: float) -> np.ndarray:
    """A heat map (H, W, 3) uint8 RGB of values (H, W): black is 0 or no value, yellow-white is ``top`` or more."""
    scaled = np.clip(np.nan_to_num(values.astype(np.float32)) / max(top, 1e-6), 0, 1)
    colored = cv2.applyColorMap((255 * scaled).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(colored, cv2.COLOR_BGR2RGB)


def top(values: np.ndarray, least: float, percentile: float = 99) -> float:
    """The value for the full colour in a picture: a percentile of the finite values, but at least ``least``."""
    known = values[np.isfinite(values)].astype(np.float32)
    return max(least, float(np.percentile(known, percentile))) if known.size else least


def read_picture(file: Path, flags: int = cv2.IMREAD_UNCHANGED) -> tuple[np.ndarray, int]:
    """An image file as ``cv2.imdecode`` gives it, and the number of pictures in it, of which this is the first.

    :raises OSError: if the file cannot be read.
    :raises MediaError: if it is no image, or not a whole one.
    """
    data = np.fromfile(file, np.uint8)  # given a name that is not UTF-8, OpenCV ends the process
    pictures = 1
    try:
        # OpenCV makes a picture of half a JPEG file, and says nothing of the further pages of a file.
        with Image.open(io.BytesIO(open_ended(data.tobytes()))) as look:
            if look.format in ("JPEG", "MPO"):
                look.draft(None, (1, 1))  # an eighth of the size, which is decoded fast
                look.load()
            else:
                pictures = getattr(look, "n_frames", 1)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        pass
    except (OSError, ValueError) as error:
        raise MediaError(f"not a whole image: {error}") from error
    image = cv2.imdecode(data, flags) if data.size else None
    if image is None:
        raise MediaError("not a readable image")
    return image, pictures


def several(pictures: int) -> str:
    """What is said of a file that holds so many pictures."""
    return f"it holds {pictures} pictures, of which only the first is read; a video of them is read to its end"


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture (H, W, 3) uint8 in the format of the file's extension.

    :raises MediaError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise MediaError(f"cannot write {path}")


def data_uri(picture: np.ndarray, quality: int = 85) -> str:
    """An RGB picture as a JPEG in a ``data:`` address."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_image(picture, "jpeg", quality).tobytes()).decode()


def write_video(path: Path, pictures: Iterable[np.ndarray], fps: float) -> None:
    """Write RGB pictures (H, W, 3) uint8 as an MP4 file that appears complete or not at all.

    Pictures of another size than the first are resized to it.

    :raises MediaError: if there is no picture, OpenCV has no encoder, or the disk is full.
    """
    partial = path.with_name(f".partial-{path.name}")
    writer, count = cv2.VideoWriter(), 0
    try:
        for picture in _of_one_size(pictures):
            size = picture.shape[1::-1]
            if not count and not any(writer.open(str(partial), cv2.VideoWriter.fourcc(*c), fps, size) for c in CODECS):
                hint = f"is the place writable, and has OpenCV an encoder of {' or '.join(CODECS)}?"
                raise MediaError(f"cannot write {path}: {hint}")
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            count += 1
    finally:
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
    """As ``write_video``, an animated WebP that repeats for ever; pages and READMEs show it like any other picture.

    :raises MediaError: if there is no picture, or the file cannot be written.
    """
    frames = [Image.fromarray(picture) for picture in _of_one_size(pictures)]
    if not frames:
        raise MediaError("there is nothing to make an animation of")
    how = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0, "quality": 60}
    try:
        with replacing(path) as partial:
            frames[0].save(partial, "WEBP", **how)
    except OSError as error:
        raise MediaError(f"cannot write {path}: {error}") from error


def _of_one_size(pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    size = None
    for picture in pictures:
        size = size or picture.shape[1::-1]
        yield picture if picture.shape[1::-1] == size else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
