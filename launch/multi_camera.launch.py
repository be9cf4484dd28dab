# SPDX-License-Identifier: Apache-2.0
"""Several cameras through one flow node, which holds the model once and one stream for each camera.

ros2 launch deq_flow_ros multi_camera.launch.py cameras:=front,rear [image:=/front/image_raw,/rear/image_raw]
    [any argument of flow.launch.py]
"""

from deq_flow_ros.ros.launching import described, flow_launch
from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """flow.launch.py, which names the image topics after the cameras."""
    return described(__file__, {"cameras": ("front,rear", "names, separated by commas")}, flow_launch())
