# SPDX-License-Identifier: Apache-2.0
"""``evaluate_bag RECORDING``: how good, how fast and how steady the flow is on it; see docs/evaluate_bag.md.

Every frame is processed, or a robot is simulated (``--realtime``); neither needs ROS. With ``--live`` the recording is
played through the real node over DDS.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deq_flow_ros import program

LIVE = "--live"


def main(args: Sequence[str] | None = None) -> int:
    """Run; returns the exit status that docs/evaluate_bag.md lists."""
    args = sys.argv if args is None else args
    if LIVE in args:
        # Imported here: only this needs ROS, and only the others need not wait for it.
        with program("evaluate_bag"):
            from deq_flow_ros.live.command import main as live

        return live([arg for arg in args if arg != LIVE])
    with program("evaluate_bag"):
        from deq_flow_ros.evaluation.command import main as offline

    return offline(args[1:])


if __name__ == "__main__":
    sys.exit(main())
