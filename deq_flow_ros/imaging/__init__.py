# SPDX-License-Identifier: Apache-2.0
"""Images: encodings, compression, calibrated cameras, flow as colour, and measures on pixels.

This package uses neither torch nor ROS, and does not read recordings.
"""
