# SPDX-License-Identifier: Apache-2.0
"""A stream of frames under a latency budget. Knows time, but no ROS."""

from deq_flow_ros.streaming.estimator import FlowEstimator, FlowInfo, FlowResult

__all__ = ["FlowEstimator", "FlowInfo", "FlowResult"]
