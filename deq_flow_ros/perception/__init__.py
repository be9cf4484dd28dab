# SPDX-License-Identifier: Apache-2.0
"""What a robot gets out of a flow field, in numpy and OpenCV alone: no ROS, no network."""
