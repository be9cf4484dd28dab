# SPDX-License-Identifier: Apache-2.0
"""Optical flow of streams of frames under a latency budget, without ROS."""

from deq_flow_ros.streaming.batch import UpdateRequest, update_together
from deq_flow_ros.streaming.eager import EagerEngine
from deq_flow_ros.streaming.estimator import RUNTIMES, FlowEstimator, choose_runtime
from deq_flow_ros.streaming.interface import EstimatorSettings, FlowInfo, FlowResult
from deq_flow_ros.streaming.stream import Stream

__all__ = [
    "RUNTIMES", "EagerEngine", "EstimatorSettings", "FlowEstimator", "FlowInfo", "FlowResult", "Stream",
    "UpdateRequest", "choose_runtime", "update_together",
]  # fmt: skip
