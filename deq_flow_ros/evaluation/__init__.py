# SPDX-License-Identifier: Apache-2.0
"""Evaluates how good, how fast and how steady the flow is on a recording, without ROS."""
