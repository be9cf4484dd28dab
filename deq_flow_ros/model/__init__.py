# SPDX-License-Identifier: Apache-2.0
"""The flow model: encoders, correlation, update operator, upsampling, sizes and weights. Knows images, not time."""

from deq_flow_ros.model.architecture import SIZES, Architecture
from deq_flow_ros.model.deq_flow import DEQFlow, FlowProblem, Prediction, update_px
from deq_flow_ros.model.encoders import Encoding
from deq_flow_ros.model.weights import WeightsError, available_models, load_model, save_model

__all__ = [
    "SIZES",
    "Architecture",
    "DEQFlow",
    "Encoding",
    "FlowProblem",
    "Prediction",
    "WeightsError",
    "available_models",
    "load_model",
    "save_model",
    "update_px",
]
