# SPDX-License-Identifier: Apache-2.0
"""The former place of what is now in ``deq_flow_ros.ros.messages``, kept for scripts that import from it."""

from deq_flow_ros.ros.messages import adapted, camera_model, image_size

__all__ = ["adapted", "camera_model", "image_size"]
