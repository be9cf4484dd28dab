# SPDX-License-Identifier: Apache-2.0
"""The flow model: encoders, correlation, update operator, upsampling, sizes and weights. Knows images, not time."""

from deq_flow_ros.model.architecture import SIZES, Architecture
from deq_flow_ros.model.deq_flow import DEQFlow, FlowProblem, Prediction, update_px, usable_levels
from deq_flow_ros.model.encoders import Encoding
from deq_flow_ros.model.update import Gates
from deq_flow_ros.model.upsampling import FACTOR, crop, pad_to_multiple, rescale
from deq_flow_ros.model.weights import WeightsError, available_models, load_model, save_model

__all__ = [
    "FACTOR",
    "SIZES",
    "Architecture",
    "DEQFlow",
    "Encoding",
    "FlowProblem",
    "Gates",
    "Prediction",
    "WeightsError",
    "available_models",
    "crop",
    "load_model",
    "pad_to_multiple",
    "rescale",
    "save_model",
    "update_px",
    "usable_levels",
]
