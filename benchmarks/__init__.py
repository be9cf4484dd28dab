# SPDX-License-Identifier: Apache-2.0
"""Every figure that the documentation quotes; ``python -m benchmarks.NAME --help`` says what it measures and how.

``accuracy``: endpoint errors beside OpenCV's methods. ``confidence``: what the uncertainty is worth. ``controller``:
how latency budgets are kept. ``cuts``: scene cuts that are missed, and false alarms. ``gpu_check``: all that a card
is needed for. ``latency``: time of a field. ``limits``: what iterations and scales are worth. ``memory``: of a
training step. ``motion_mask``, ``point_tracks``, ``time_to_contact``: what the nodes make of the flow. ``settle``:
whether it settles. ``solvers``: how they converge. ``warm_start``: what a start is worth.
"""
