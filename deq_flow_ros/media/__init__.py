# SPDX-License-Identifier: Apache-2.0
"""The former place of what is now in ``deq_flow_ros.imaging``, kept for scripts that import from it."""
