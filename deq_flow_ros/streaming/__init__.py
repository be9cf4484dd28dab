# SPDX-License-Identifier: Apache-2.0
"""Streams of frames under a latency budget. Knows time, but no ROS."""

from deq_flow_ros.streaming.estimator import FlowEstimator
from deq_flow_ros.streaming.result import FlowInfo, FlowResult
from deq_flow_ros.streaming.settings import EstimatorSettings
from deq_flow_ros.streaming.together import UpdateRequest, update_together

__all__ = ["EstimatorSettings", "FlowEstimator", "FlowInfo", "FlowResult", "UpdateRequest", "update_together"]
