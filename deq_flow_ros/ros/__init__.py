# SPDX-License-Identifier: Apache-2.0
"""The ROS 2 layer: the only one that knows messages, topics and nodes."""

import os

# Before PyTorch is loaded, which reads it once. By default threads that wait for one another spin; with a core less
# than there are threads, as whenever another process has work, every operation then waits for the scheduler
# (docs/speed.md). Threads that sleep cost a little on an idle machine, and a robot's is not idle.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
