# SPDX-License-Identifier: Apache-2.0
"""Optical flow of streams of frames under a latency budget, without ROS."""

from deq_flow_ros.streaming.batch import UpdateRequest, update_together
from deq_flow_ros.streaming.eager import EagerEngine
from deq_flow_ros.streaming.engine import Engine
from deq_flow_ros.streaming.estimator import FlowEstimator
from deq_flow_ros.streaming.result import FlowInfo, FlowResult
from deq_flow_ros.streaming.runtime import RUNTIMES, choose_runtime
from deq_flow_ros.streaming.settings import EstimatorSettings
from deq_flow_ros.streaming.stream import Stream

__all__ = [
    "RUNTIMES", "EagerEngine", "Engine", "EstimatorSettings", "FlowEstimator", "FlowInfo", "FlowResult", "Stream",
    "UpdateRequest", "choose_runtime", "update_together",
]  # fmt: skip
