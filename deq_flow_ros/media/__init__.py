# SPDX-License-Identifier: Apache-2.0
"""Files in and out: image sources, bags, flow files, colour coding, the demo scene and reports. Knows neither torch
nor ROS.
"""

from deq_flow_ros.media.frame import Frame, MediaError, Source
from deq_flow_ros.media.sources import open_source

__all__ = ["Frame", "MediaError", "Source", "open_source"]
