# SPDX-License-Identifier: Apache-2.0
"""``flow_view``: a flow node and its live pictures in a web page, served on this machine.

``board`` is what the two sides share: ``node`` puts up pictures and figures and knows no HTTP, ``server`` hands them to
browsers and knows no ROS. ``flow_view`` is the process that has both.
"""
