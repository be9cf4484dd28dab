# SPDX-License-Identifier: Apache-2.0
"""Flow files: Middlebury `.flo` and KITTI 16-bit `.png`.

Formats: Baker et al., "A Database and Evaluation Methodology for Optical Flow", 2011 (.flo: magic 202021.25, width,
height, then x and y displacements as float32, all little-endian; values above 1e9 are unknown). KITTI development kit
(.png: three channels of 16 bits, `value = 64 * displacement + 2^15`, third channel 1 where the flow is valid).
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.media.frame import MediaError

FLO_MAGIC = np.float32(202021.25)
FLO_UNKNOWN = 1e9
LARGEST_SIDE = 100_000


def read_flow(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(flow (H, W, 2) float32 px, valid (H, W) bool) of a `.flo` or KITTI `.png` file; flow is 0 where it is not valid.

    Raises `MediaError` where the file is missing, truncated, or holds something else than its name says.
    """
    path = Path(path)
    readers = {".flo": _read_flo, ".png": _read_kitti}
    if path.suffix.lower() not in readers:
        raise MediaError(f"expected a flow file named {' or '.join(readers)}, got {path}")
    if not path.is_file():
        raise MediaError(f"the flow file {path} does not exist")
    flow, valid = readers[path.suffix.lower()](path)
    flow[~valid] = 0
    return flow, valid


def write_flow(path: str | Path, flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Write flow (H, W, 2) px to a `.flo` (exact) or KITTI `.png` (to 1/64 px, within +-512 px) file.

    Without `valid` (H, W) bool, the finite vectors are the valid ones. Raises `MediaError` for another shape, name or
    range.
    """
    path = Path(path)
    flow = np.asarray(flow, np.float32)
    if flow.ndim != 3 or flow.shape[2] != 2 or flow.size == 0:
        raise MediaError(f"expected flow of shape (H, W, 2), got {flow.shape}")
    valid = np.isfinite(flow).all(axis=2) if valid is None else np.asarray(valid, bool)
    if valid.shape != flow.shape[:2]:
        raise MediaError(f"expected validity of shape {flow.shape[:2]}, like the flow, got {valid.shape}")
    if not np.isfinite(flow[valid]).all():
        raise MediaError("expected finite flow where it is valid, got NaN or infinity")
    if path.suffix.lower() == ".flo":
        height, width = flow.shape[:2]
        body = np.where(valid[:, :, None], flow, np.float32(2 * FLO_UNKNOWN)).astype("<f4")
        path.write_bytes(
            FLO_MAGIC.astype("<f4").tobytes() + np.array([width, height], "<i4").tobytes() + body.tobytes()
        )
    elif path.suffix.lower() == ".png":
        coded = np.rint(np.where(valid[:, :, None], flow, 0) * 64.0 + 32768.0)
        if coded.min() < 0 or coded.max() > 65535:
            largest = float(np.abs(flow[valid]).max())
            raise MediaError(
                f"expected flow within +-512 px, which is what KITTI's format can hold, got {largest:.1f} px; "
                "write .flo instead"
            )
        # OpenCV stores the channels in the order blue, green, red: valid, v, u.
        image = np.dstack([valid.astype(np.uint16), coded[:, :, 1].astype(np.uint16), coded[:, :, 0].astype(np.uint16)])
        if not cv2.imwrite(str(path), image):
            raise MediaError(f"cannot write {path}")
    else:
        raise MediaError(f"expected a flow file named .flo or .png, got {path}")


def _read_flo(path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = path.read_bytes()
    if len(raw) < 12 or np.frombuffer(raw, "<f4", 1)[0] != FLO_MAGIC:
        raise MediaError(f"{path} is no .flo file: expected it to begin with {FLO_MAGIC} as float32, got {raw[:4]!r}")
    width, height = (int(side) for side in np.frombuffer(raw, "<i4", 2, 4))
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise MediaError(f"{path} is damaged: it states a size of {width}x{height}")
    if len(raw) != 12 + 8 * width * height:
        raise MediaError(
            f"{path} is cut short or damaged: expected {12 + 8 * width * height} bytes for {width}x{height}, "
            f"got {len(raw)}"
        )
    flow = np.frombuffer(raw, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)
    valid: np.ndarray = np.all(np.abs(flow) <= FLO_UNKNOWN, axis=2)  # False for NaN as well
    return flow, valid


def _read_kitti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise MediaError(f"{path} cannot be read as PNG; it is cut short or damaged")
    if image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] != 3:
        raise MediaError(
            f"{path} is no KITTI flow: expected 16 bits and 3 channels, got {image.dtype} of shape {image.shape}; "
            "is it a plain picture?"
        )
    valid = image[:, :, 0] > 0
    return (image[:, :, :0:-1].astype(np.float32) - 32768.0) / 64.0, valid
