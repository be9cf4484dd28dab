# SPDX-License-Identifier: Apache-2.0
"""Sparsification: what a measure of uncertainty is worth, as the error of the pixels left when the worst are taken out.

Ilg et al., "Uncertainty Estimates and Multi-Hypotheses Networks for Optical Flow" (ECCV 2018, arXiv 1802.07095),
section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS = 100


@dataclass(frozen=True)
class Sparsification:
    """Curves over the share of pixels taken out, 0, 1/100, ..., 99/100; 1 is the mean error of all pixels.

    :ivar curve: (100,) mean error of the pixels left, the most uncertain by the measure taken out first.
    :ivar oracle: (100,) the same by the error itself: no measure can lie below.
    """

    curve: np.ndarray
    oracle: np.ndarray

    @property
    def ause(self) -> float:
        """Area under the sparsification error, the mean distance of the curve from the oracle's; 0 is perfect."""
        return float((self.curve - self.oracle).mean())

    @property
    def random(self) -> float:
        """The same area of a measure that knows nothing: its curve stays at 1."""
        return float((1 - self.oracle).mean())


def sparsify(error: np.ndarray, uncertainty: np.ndarray) -> Sparsification:
    """Curves of one pair of images.

    Pixels of one uncertainty are taken out together, as their mean: no order of the pixels in the image may help or
    harm a measure that cannot tell them apart.

    :param error: (N,) endpoint error, px.
    :param uncertainty: (N,) in any unit; NaN, no opinion, counts as the largest.
    :raises ValueError: if the shapes differ, there are too few pixels, or the error is zero everywhere or not finite.
    """
    if error.ndim != 1 or error.shape != uncertainty.shape or error.size < STEPS:
        raise ValueError(
            f"expected error and uncertainty as two arrays (N,), N at least {STEPS}, got {error.shape} and "
            f"{uncertainty.shape}"
        )
    error = error.astype(np.float64)
    if not (np.isfinite(error).all() and error.mean() > 0):
        raise ValueError("expected finite errors that are not all zero: nothing can be sorted out otherwise")
    uncertainty = np.where(np.isnan(uncertainty), np.inf, uncertainty)
    values, group = np.unique(uncertainty, return_inverse=True)
    means = np.bincount(group, error, len(values)) / np.bincount(group, minlength=len(values))
    return Sparsification(*(_curve(np.sort(error)) if own else _curve(means[np.sort(group)]) for own in (False, True)))


def _curve(ascending: np.ndarray) -> np.ndarray:
    """Errors in the order in which they are kept, to the mean of those left at each share taken out."""
    left = np.round(len(ascending) * (1 - np.arange(STEPS) / STEPS)).astype(int)
    sums = np.cumsum(ascending)
    curve: np.ndarray = sums[left - 1] / left / (sums[-1] / len(ascending))
    return curve
