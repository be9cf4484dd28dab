# SPDX-License-Identifier: Apache-2.0
"""A picture in every encoding that a camera may send, with and without padded rows."""

import numpy as np

HEIGHT, WIDTH = 24, 32
BAYER_SITES = {  # colour channel at (row parity, column parity)
    "rggb": ((0, 1), (1, 2)),
    "bggr": ((2, 1), (1, 0)),
    "gbrg": ((1, 2), (0, 1)),
    "grbg": ((1, 0), (2, 1)),
}


def picture() -> np.ndarray:
    """RGB whose channels differ, smooth enough for colour subsampling and demosaicing to reproduce it closely."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([60 + 4 * rows, 40 + 5 * columns, 200 - 3 * rows - columns], axis=2).astype(np.uint8)


def chroma_of(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Luma, U and V (H, W) of a picture: ITU-R BT.601, studio range."""
    red, green, blue = (rgb[:, :, i].astype(float) for i in range(3))
    luma = 16 + 0.257 * red + 0.504 * green + 0.098 * blue
    return luma, 128 - 0.148 * red - 0.291 * green + 0.439 * blue, 128 + 0.439 * red - 0.368 * green - 0.071 * blue


def encode(rgb: np.ndarray, encoding: str) -> np.ndarray:
    """The picture as (rows, samples per row[, C]) of `encoding`, written by the definition of the encoding."""
    if encoding.endswith("16") or encoding.startswith("16UC"):
        eight = encoding.replace("16UC", "8UC") if encoding.startswith("16UC") else f"{encoding[:-2]}8"
        return encode(rgb, eight).astype(np.uint16) * 257 + 100  # rounds to the same; its two bytes differ
    height, width = rgb.shape[:2]
    if encoding in ("mono8", "8UC1"):
        return rgb[:, :, 1]
    if encoding.startswith("bayer"):
        pattern = BAYER_SITES[encoding[6:10]]
        mosaic = np.empty((height, width), np.uint8)
        for row in (0, 1):
            for column in (0, 1):
                mosaic[row::2, column::2] = rgb[row::2, column::2, pattern[row][column]]
        return mosaic
    if encoding[0] in "uyn":
        luma, u, v = (plane.round().astype(np.uint8) for plane in chroma_of(rgb))
        if encoding.startswith("nv"):
            every = 1 if encoding == "nv24" else 2
            first, second = (v, u) if encoding == "nv21" else (u, v)
            chroma = np.stack([first[::every, ::every], second[::every, ::every]], axis=2)
            return np.concatenate([luma, chroma.reshape(-1, width)])
        chroma = np.stack([u[:, ::2], v[:, ::2]], axis=2).reshape(height, width)
        return np.stack([chroma, luma] if encoding in ("uyvy", "yuv422") else [luma, chroma], axis=2)
    samples = rgb if encoding.startswith("rgb") else rgb[:, :, ::-1]
    alpha = np.full((height, width, 1), 77, np.uint8)
    return np.concatenate([samples, alpha], axis=2) if "a" in encoding or encoding == "8UC4" else samples


def padded(samples: np.ndarray, encoding: str, padding: int) -> tuple[np.ndarray, int]:
    """Bytes of an image and its step, with `padding` bytes after each row, twice as many after a chroma row of nv24."""
    rows = np.ascontiguousarray(samples).reshape(samples.shape[0], -1).view(np.uint8)
    step = rows.shape[1] + padding
    if encoding != "nv24":
        return np.pad(rows, ((0, 0), (0, padding)), constant_values=255).reshape(-1), step
    luma, chroma = rows[: len(rows) // 3], rows[len(rows) // 3 :].reshape(len(rows) // 3, -1)
    planes = [np.pad(luma, ((0, 0), (0, padding))), np.pad(chroma, ((0, 0), (0, 2 * padding)))]
    return np.concatenate([plane.reshape(-1) for plane in planes]), step
