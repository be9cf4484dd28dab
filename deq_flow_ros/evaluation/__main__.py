# SPDX-License-Identifier: Apache-2.0
"""``python -m deq_flow_ros.evaluation``: ``evaluate_bag`` where there is no ROS."""

import sys

from deq_flow_ros import program

with program("evaluate_bag"):
    from deq_flow_ros.evaluation.command import main

sys.exit(main(sys.argv[1:]))
