# SPDX-License-Identifier: Apache-2.0
"""What moves by itself while the camera moves: the flow node, and the node that makes a mask of its flow.

ros2 launch deq_flow_ros motion_mask.launch.py image:=/camera/image_raw [any argument of flow.launch.py]
ros2 launch deq_flow_ros motion_mask.launch.py start_flow_node:=false [name:=flow_node]   # with one that runs already
"""

from deq_flow_ros.ros.launching import with_flow_node
from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """Arguments, the flow node unless one runs already, and the mask."""
    return with_flow_node(
        __file__,
        "motion_mask",
        own_file="mask_params_file",
        inputs={"imu": ("", "topic of sensor_msgs/Imu that gives the rotation of the camera; empty = none")},
    )
