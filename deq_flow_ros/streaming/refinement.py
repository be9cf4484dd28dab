# SPDX-License-Identifier: Apache-2.0
"""A flow field made finer at the resolution of its images, behind the network.

The network finds one flow for each cell of 8x8 pixels and shares it among the pixels by weights. What differs within a
cell is left to the classical way: the field that fits brightness and gradients of the two images best while it stays
smooth, found from the network's field (Brox et al., High accuracy optical flow estimation based on a theory for
warping, ECCV 2004), in OpenCV's implementation, which its DIS flow ends with as well (Kroeger et al., ECCV 2016).
"""

from __future__ import annotations

import cv2
import numpy as np

# Smoothness, brightness and gradient constancy, weighed by the error on pairs with truth (docs/budget.md): OpenCV's own
# defaults, 20, 5 and 10, smooth twice as much as is best behind a network.
ALPHA, DELTA, GAMMA = 5.0, 1.0, 10.0


def refined(flow: np.ndarray, image1: np.ndarray, image2: np.ndarray, iterations: int) -> np.ndarray:
    """The field that fits the images best near the one given.

    :param flow: (H, W, 2) float32 px, on the pixels of image 1; it stays as it is.
    :param image1: (H, W, 3) uint8 RGB, likewise image 2.
    :param iterations: linearisations, each with five steps of successive over-relaxation; at least 1.
    :returns: (H, W, 2) float32 px.
    """
    solver = cv2.VariationalRefinement.create()
    solver.setAlpha(ALPHA)
    solver.setDelta(DELTA)
    solver.setGamma(GAMMA)
    solver.setFixedPointIterations(iterations)
    grey1, grey2 = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (image1, image2))
    return np.asarray(solver.calc(grey1, grey2, flow.copy()))
