# SPDX-License-Identifier: Apache-2.0
"""``flow_view``: a flow node and its live pictures in a web page, served on this machine.

A board is what the two sides share: ``flow_view`` puts up pictures and figures, ``server`` hands them to browsers and
knows no ROS.
"""
