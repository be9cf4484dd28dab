# SPDX-License-Identifier: Apache-2.0
"""Flow files: Middlebury ``.flo``, KITTI 16-bit ``.png``, FlyingThings3D ``.pfm`` and Spring ``.flo5``.

- ``.flo`` (Baker et al., "A Database and Evaluation Methodology for Optical Flow", 2011): the magic number 202021.25,
  width, height, then x and y displacements as float32, all little-endian. Values above 1e9 are unknown.
- ``.png`` (KITTI development kit): three channels of 16 bits, ``value = 64 * displacement + 2^15``; the third channel
  is 1 where the flow is valid.
- ``.pfm`` (portable float map): a text header with ``PF``, width, height and scale, then rows from the bottom up with
  three float32 per pixel, little-endian if the scale is negative. Its magnitude does not change the values.
- ``.flo5`` (Spring): HDF5 with one data set ``flow`` of shape (height, width, 2), which is NaN where unknown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.imaging import MediaError

FLO_MAGIC = np.float32(202021.25)
UNKNOWN = 1e9
LARGEST_SIDE, LARGEST_AREA = 100_000, 2**27  # the flow of so many pixels takes 1 GB
_Flow = tuple[np.ndarray, np.ndarray]


def read_flow(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a flow file of the format that its extension names.

    :returns: the flow (H, W, 2) float32 px, and where it is valid (H, W) bool; the flow is 0 where it is not valid.
    :raises MediaError: if the file is missing, truncated, or of another format than its extension says.
    """
    path = Path(path)
    read, _ = _format(path)
    if not path.is_file():
        raise MediaError(f"the flow file {path} does not exist")
    try:
        flow, valid = read(path)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error}") from error
    flow[~valid] = 0
    return flow, valid


def write_flow(path: str | Path, flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Write a flow file of the format that its extension names.

    ``.flo``, ``.pfm`` and ``.flo5`` store the exact values; a KITTI ``.png`` rounds to 1/64 px, within +-512 px.

    :param flow: (H, W, 2) px.
    :param valid: (H, W) bool; None: the vectors that are finite.
    :raises MediaError: for another shape, extension or range, or if the file cannot be written.
    """
    path = Path(path)
    _, write = _format(path)
    flow = np.asarray(flow, np.float32)
    if flow.ndim != 3 or flow.shape[2] != 2 or flow.size == 0:
        raise MediaError(f"expected flow of shape (H, W, 2), got {flow.shape}")
    valid = np.isfinite(flow).all(axis=2) if valid is None else np.asarray(valid, bool)
    if valid.shape != flow.shape[:2]:
        raise MediaError(f"expected validity of shape {flow.shape[:2]}, like the flow, got {valid.shape}")
    if not np.isfinite(flow[valid]).all():
        raise MediaError("expected finite flow where it is valid, got NaN or infinity")
    try:
        write(path, flow, valid)
    except OSError as error:
        raise MediaError(f"cannot write {path}: {error}") from error


def _format(path: Path) -> tuple[Callable[[Path], _Flow], Callable[[Path, np.ndarray, np.ndarray], None]]:
    if path.suffix.lower() not in _FORMATS:
        raise MediaError(f"expected a flow file named {', '.join(_FORMATS)}, got {path}")
    return _FORMATS[path.suffix.lower()]


def _check_size(path: Path, width: int, height: int) -> None:
    """Before memory is allocated for it."""
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE and width * height <= LARGEST_AREA):
        wanted = f"sides of 1 to {LARGEST_SIDE} and at most {LARGEST_AREA} pixels"
        raise MediaError(f"{path} is damaged: it states a size of {width}x{height}, expected {wanted}")


def _read_body(path: Path, header: int, width: int, height: int, channels: int, dtype: str) -> np.ndarray:
    """The binary rows after ``header`` bytes, (height, width, channels), with which the file must end."""
    _check_size(path, width, height)
    expected, got = header + 4 * channels * width * height, path.stat().st_size
    if got != expected:
        raise MediaError(f"{path} is truncated or damaged: expected {expected} bytes for {width}x{height}, got {got}")
    return np.fromfile(path, dtype, offset=header).reshape(height, width, channels)


def _known(flow: np.ndarray) -> _Flow:
    """Flow, and where it is known: NaN and large values stand for unknown."""
    return flow, np.all(np.abs(flow) <= UNKNOWN, axis=2)


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _read_flo(path: Path) -> _Flow:
    head = _head(path, 12)
    if len(head) < 12 or np.frombuffer(head, "<f4", 1)[0] != FLO_MAGIC:
        raise MediaError(f"{path} is not a .flo file: expected it to begin with float32 {FLO_MAGIC}, got {head[:4]!r}")
    width, height = (int(side) for side in np.frombuffer(head, "<i4", 2, 4))
    return _known(_read_body(path, 12, width, height, 2, "<f4").astype(np.float32, copy=False))


def _write_flo(path: Path, flow: np.ndarray, valid: np.ndarray) -> None:
    height, width = valid.shape
    body = np.where(valid[:, :, None], flow, np.float32(2 * UNKNOWN)).astype("<f4")
    path.write_bytes(FLO_MAGIC.astype("<f4").tobytes() + np.array([width, height], "<i4").tobytes() + body.tobytes())


def _read_kitti(path: Path) -> _Flow:
    head, image = _head(path, 24), None
    if len(head) == 24 and head.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_size(path, *(int(side) for side in np.frombuffer(head, ">u4", 2, 16)))
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise MediaError(f"{path} cannot be read as PNG; it is truncated or damaged")
    if image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} of shape {image.shape}; is it a plain picture?"
        raise MediaError(f"{path} is not a KITTI flow file: expected 16 bits and 3 channels, got {got}")
    valid = image[:, :, 0] > 0
    return (image[:, :, :0:-1].astype(np.float32) - 32768.0) / 64.0, valid


def _write_kitti(path: Path, flow: np.ndarray, valid: np.ndarray) -> None:
    coded = np.rint(np.where(valid[:, :, None], flow, 0) * 64.0 + 32768.0)
    if coded.min() < 0 or coded.max() > 65535:
        got = f"{float(np.abs(flow[valid]).max()):.1f} px; write .flo instead"
        raise MediaError(f"expected flow within +-512 px, the range of the KITTI format, got {got}")
    # OpenCV stores the channels in the order blue, green, red: valid, v, u.
    if not cv2.imwrite(str(path), np.dstack([valid, coded[:, :, 1], coded[:, :, 0]]).astype(np.uint16)):
        raise MediaError(f"cannot write {path}")


def _read_pfm(path: Path) -> _Flow:
    head = _head(path, 128)
    match = re.match(rb"(P[Ff])\s+(\d{1,9})\s+(\d{1,9})\s+([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s", head)
    if match is None:
        raise MediaError(f"{path} is not a .pfm file: expected 'PF', width, height and scale, got {head[:24]!r}")
    if match[1] != b"PF":
        raise MediaError(f"{path} does not hold flow: expected 3 channels ('PF'), got one ('Pf'); is it a disparity?")
    if not float(match[4]):
        raise MediaError(f"{path} is damaged: expected a scale other than 0, got {match[4]!r}")
    order = "<f4" if match[4].startswith(b"-") else ">f4"
    rows = _read_body(path, match.end(), int(match[2]), int(match[3]), 3, order)
    return _known(rows[::-1, :, :2].astype(np.float32))


def _write_pfm(path: Path, flow: np.ndarray, valid: np.ndarray) -> None:
    height, width = valid.shape
    body = np.zeros((height, width, 3), "<f4")
    body[:, :, :2] = np.where(valid[:, :, None], flow, np.float32(np.nan))
    path.write_bytes(f"PF\n{width} {height}\n-1.0\n".encode() + body[::-1].tobytes())


def _read_flo5(path: Path) -> _Flow:
    import h5py  # here, because it takes a quarter of a second and is rarely needed

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise MediaError(f"{path} is not a .flo5 file, or is truncated: HDF5 says {error}") from error
    with file:
        link = file.get("flow", getlink=True)
        flow = file["flow"] if isinstance(link, h5py.HardLink) else None
        if not isinstance(flow, h5py.Dataset):
            raise MediaError(f"{path} is not a .flo5 file: expected a data set named 'flow', got {sorted(file)[:8]}")
        if len(flow.shape or ()) != 3 or flow.shape[2] != 2 or flow.dtype.kind != "f":
            got = f"{flow.dtype} of shape {flow.shape}"
            raise MediaError(f"{path} does not hold flow: expected floats of shape (H, W, 2), got {got}")
        _check_size(path, flow.shape[1], flow.shape[0])
        # HDF5 fills missing values with zeros, or takes them from other files.
        if flow.chunks is None:
            stored = not flow.external and not flow.is_virtual and flow.id.get_storage_size() >= flow.nbytes
        else:
            chunks = math.prod(math.ceil(side / chunk) for side, chunk in zip(flow.shape, flow.chunks, strict=True))
            stored = math.prod(flow.chunks) <= 2 * LARGEST_AREA and flow.id.get_num_chunks() == chunks
        if not stored:
            held = flow.id.get_storage_size()
            raise MediaError(f"{path} is damaged: it states {flow.nbytes} bytes but holds only {held}")
        return _known(flow.astype(np.float32)[()])


def _write_flo5(path: Path, flow: np.ndarray, valid: np.ndarray) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        data = np.where(valid[:, :, None], flow, np.float32(np.nan))
        file.create_dataset("flow", data=data, compression="gzip", compression_opts=5)


_FORMATS = {
    ".flo": (_read_flo, _write_flo), ".png": (_read_kitti, _write_kitti), ".pfm": (_read_pfm, _write_pfm),
    ".flo5": (_read_flo5, _write_flo5),
}  # fmt: skip
FLOW_SUFFIXES = tuple(_FORMATS)
