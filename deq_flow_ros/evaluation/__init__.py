# SPDX-License-Identifier: Apache-2.0
"""How good, how fast and how steady the flow is on a recording. Knows streams and files, but no ROS."""
