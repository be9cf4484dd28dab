# SPDX-License-Identifier: Apache-2.0
"""Reading and writing of recordings: bags, videos, folders of images, cameras and flow files.

This package uses neither torch nor ROS.
"""

from deq_flow_ros.imaging import Frame, MediaError
from deq_flow_ros.recordings.source import Source
from deq_flow_ros.recordings.sources import open_source

__all__ = ["Frame", "MediaError", "Source", "open_source"]
