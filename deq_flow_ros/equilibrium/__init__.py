# SPDX-License-Identifier: Apache-2.0
"""Fixed points of any function ``f(z)``: solvers, gradients, sparse fixed-point correction, Jacobian tools.

A state is a tuple of tensors whose first dimension is the batch; ``f`` maps it to one of the same shapes. The method is
that of Deep Equilibrium Optical Flow Estimation, arXiv 2204.08442.
"""

from deq_flow_ros.equilibrium.fixed_point import Measure, Solution, absolute_residual, relative_residual, solve
from deq_flow_ros.equilibrium.gradients import (
    Gradient,
    correction_weights,
    implicit_gradient,
    jacobian_penalty,
    phantom_gradient,
    sparse_correction,
    spectral_radius,
    uniform_positions,
    unroll,
)  # fmt: skip
from deq_flow_ros.equilibrium.solvers import Anderson, Broyden, Picard, Solver, make_solver
from deq_flow_ros.equilibrium.stopping import Function, Pace, Progress, Rules, Samples, State, StopReason

__all__ = [
    "Anderson", "Broyden", "Function", "Gradient", "Measure", "Pace", "Picard", "Progress", "Rules", "Samples",
    "Solution", "Solver", "State", "StopReason", "absolute_residual", "correction_weights", "implicit_gradient",
    "jacobian_penalty", "make_solver", "phantom_gradient", "relative_residual", "solve", "sparse_correction",
    "spectral_radius", "uniform_positions", "unroll",
]  # fmt: skip
