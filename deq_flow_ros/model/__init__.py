# SPDX-License-Identifier: Apache-2.0
"""The flow of pairs of images: encoders, correlation, update operators, upsampling, sizes and weights."""

from deq_flow_ros.model.architecture import SIZES, Architecture
from deq_flow_ros.model.cells import FACTOR, crop, pad_to_multiple, rescale
from deq_flow_ros.model.checkpoints import DTYPES, WeightsError
from deq_flow_ros.model.deq_flow import DEQFlow, FlowProblem, Prediction, update_px, usable_levels
from deq_flow_ros.model.encoders import Encoding
from deq_flow_ros.model.update import UPDATE_OPERATORS, Prepared, UpdateOperator, register_update_operator
from deq_flow_ros.model.weights import PRECISIONS, available_models, choose_precision, load_model, save_model

__all__ = [
    "DTYPES", "FACTOR", "PRECISIONS", "SIZES", "UPDATE_OPERATORS", "Architecture", "DEQFlow", "Encoding", "FlowProblem",
    "Prediction", "Prepared", "UpdateOperator", "WeightsError", "available_models", "choose_precision", "crop",
    "load_model", "pad_to_multiple", "register_update_operator", "rescale", "save_model", "update_px", "usable_levels",
]  # fmt: skip
