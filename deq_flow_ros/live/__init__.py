# SPDX-License-Identifier: Apache-2.0
"""Live runs of ``evaluate_bag``: player and node as processes over DDS, and what they did."""

import deq_flow_ros.ros  # noqa: F401  (sets how threads wait, before PyTorch is loaded; loads nothing of ROS)
