# SPDX-License-Identifier: Apache-2.0
"""Images: encodings, compression, cameras, flow as colour, measures on pixels. Knows neither torch nor ROS nor files of
recordings.
"""
