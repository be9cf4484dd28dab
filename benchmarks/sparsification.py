# SPDX-License-Identifier: Apache-2.0
"""Sparsification tells what a measure of uncertainty is worth: it gives the error of the pixels that are left when the
most uncertain ones are taken out.

Ilg et al., "Uncertainty Estimates and Multi-Hypotheses Networks for Optical Flow" (ECCV 2018, arXiv 1802.07095),
section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS = 100


@dataclass(frozen=True)
class Sparsification:
    """Curves over the share of pixels taken out: 0, 1/100, ..., 99/100. A value of 1 is the mean error of all pixels.

    :ivar curve: (100,) mean error of the pixels left when those that are most uncertain by the measure are taken out
        first.
    :ivar oracle: (100,) the same by the error itself. No measure can be below it.
    """

    curve: np.ndarray
    oracle: np.ndarray

    @property
    def ause(self) -> float:
        """Area under the sparsification error, which is the mean distance of the curve from that of the oracle; 0 is
        perfect.
        """
        return float((self.curve - self.oracle).mean())

    @property
    def random(self) -> float:
        """The area for a measure that knows nothing, whose curve stays at 1."""
        return float((1 - self.oracle).mean())


def sparsify(error: np.ndarray, uncertainty: np.ndarray) -> Sparsification:
    """The curves of one pair of images.

    Pixels of equal uncertainty are taken out together and count with their mean error, so that the order of the pixels
    in the image does not matter.

    :param error: (N,) endpoint error, px.
    :param uncertainty: (N,) in any unit. NaN means "not known" and counts as the largest.
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
    """The mean error that is left at each share taken out, from the errors in the order in which they are kept."""
    left = np.round(len(ascending) * (1 - np.arange(STEPS) / STEPS)).astype(int)
    sums = np.cumsum(ascending)
    curve: np.ndarray = sums[left - 1] / left / (sums[-1] / len(ascending))
    return curve
