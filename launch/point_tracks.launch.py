# SPDX-License-Identifier: Apache-2.0
"""Points followed from image to image: the flow node, and the node that follows the points.

ros2 launch deq_flow_ros point_tracks.launch.py image:=/camera/image_raw [any argument of flow.launch.py]
ros2 launch deq_flow_ros point_tracks.launch.py start_flow_node:=false [name:=flow_node]   # with one that runs already
"""

from functools import partial

from deq_flow_ros.ros.launching import with_flow_node

INPUTS = {"image": ("image", "image topic, raw, of both nodes")}
generate_launch_description = partial(with_flow_node, __file__, "point_tracks", INPUTS)
