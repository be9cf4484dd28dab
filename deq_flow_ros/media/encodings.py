# SPDX-License-Identifier: Apache-2.0
"""The former name of ``deq_flow_ros.imaging.encodings``."""

from deq_flow_ros.imaging.encodings import ENCODINGS, EncodingError, check_layout, to_rgb

__all__ = ["ENCODINGS", "EncodingError", "check_layout", "to_rgb"]
