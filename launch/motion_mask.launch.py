# SPDX-License-Identifier: Apache-2.0
"""What moves by itself while the camera moves: the flow node, and the node that makes a mask of its flow.

ros2 launch deq_flow_ros motion_mask.launch.py image:=/camera/image_raw [any argument of flow.launch.py]
ros2 launch deq_flow_ros motion_mask.launch.py start_flow_node:=false [name:=flow_node]   # with one that runs already
"""

from functools import partial

from deq_flow_ros.ros.launching import with_flow_node

INPUTS = {"imu": ("", "topic of sensor_msgs/Imu that gives the rotation of the camera; empty = none")}
generate_launch_description = partial(with_flow_node, __file__, "motion_mask", INPUTS)
