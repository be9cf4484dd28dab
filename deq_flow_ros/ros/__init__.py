# SPDX-License-Identifier: Apache-2.0
"""The ROS 2 layer: the only one that knows messages, topics and nodes."""
