# SPDX-License-Identifier: Apache-2.0
"""The engine that replays captured graphs: for a GPU, where launching operations one by one takes most of the time."""

from deq_flow_ros.streaming.graphs.device import Captured, CudaDevice, Done, GraphDevice
from deq_flow_ros.streaming.graphs.engine import GraphEngine

__all__ = ["Captured", "CudaDevice", "Done", "GraphDevice", "GraphEngine"]
