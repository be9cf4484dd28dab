# SPDX-License-Identifier: Apache-2.0
"""The flow node and its live pictures in a web page on this machine, http://127.0.0.1:8080 unless told otherwise.

ros2 launch deq_flow_ros view.launch.py image:=/camera/image_raw [port:=8081] [any argument of flow.launch.py]
ros2 launch deq_flow_ros view.launch.py node:=false [namespace:=...] [name:=...]     # of a node that runs already
"""

from deq_flow_ros.ros.launching import described, flow_launch
from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """flow.launch.py with the page."""
    return described(__file__, {"view": ("true", "serve the page")}, flow_launch())
