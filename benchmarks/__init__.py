# SPDX-License-Identifier: Apache-2.0
"""Every figure that the documentation quotes; ``python -m benchmarks.NAME --help`` says what it measures and how.

``accuracy``: endpoint errors beside those of OpenCV's methods. ``confidence``: how well the uncertainty tells errors.
``controller``: how latency budgets are kept. ``cuts``: scene cuts that are missed, and false alarms. ``gpu_check``: all
tests and figures that need a CUDA card. ``latency``: the time of a field. ``limits``: what iterations and scales are
worth. ``memory``: the memory of a training step. ``motion_mask``, ``point_tracks``, ``time_to_contact``: the accuracy
of the nodes that use the flow. ``settle``: whether the iteration ends in one state from any start. ``warm_start``: what
the state of the pair before is worth as a start.
"""
