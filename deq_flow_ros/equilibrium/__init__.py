# SPDX-License-Identifier: Apache-2.0
"""Fixed points of any ``f(z)``: solvers, gradients through them, sparse fixed-point correction.

Nothing here knows of images or flow: a state is a tuple of tensors whose first dimension is the batch, and ``f`` maps
such a tuple to one of the same shapes. The method: Deep Equilibrium Optical Flow Estimation, arXiv 2204.08442.
"""

from deq_flow_ros.equilibrium.gradients import correction_weights, phantom_gradient, sparse_correction
from deq_flow_ros.equilibrium.solvers import (
    Measure,
    Picard,
    Solution,
    Solver,
    State,
    StopReason,
    make_solver,
    relative_residual,
    solve,
)

__all__ = [
    "Measure",
    "Picard",
    "Solution",
    "Solver",
    "State",
    "StopReason",
    "correction_weights",
    "make_solver",
    "phantom_gradient",
    "relative_residual",
    "solve",
    "sparse_correction",
]
