# SPDX-License-Identifier: Apache-2.0
"""In how many seconds the camera meets what it sees: the flow node, and the node that tells the times.

ros2 launch deq_flow_ros time_to_contact.launch.py image:=/camera/image_raw [any argument of flow.launch.py]
ros2 launch deq_flow_ros time_to_contact.launch.py start_flow_node:=false [name:=flow_node]  # one that runs already
"""

from functools import partial

from deq_flow_ros.ros.launching import with_flow_node

generate_launch_description = partial(with_flow_node, __file__, "time_to_contact", {})
