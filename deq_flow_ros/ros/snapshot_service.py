# SPDX-License-Identifier: Apache-2.0
"""What the service ``~/snapshot`` does: copies between two frames, written while images go on coming in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rclpy.logging
from rclpy.executors import Executor
from std_srvs.srv import Trigger

from deq_flow_ros.ros import process
from deq_flow_ros.ros.camera import Camera
from deq_flow_ros.ros.snapshot import write_snapshot
from deq_flow_ros.ros.worker import FrameWorker

TIMEOUT_S = 5.0


async def answer(
    response: Trigger.Response,
    worker: FrameWorker,
    cameras: Sequence[Camera],
    folder: str,
    about: Mapping[str, Any],
    executor: Executor | None,
) -> Trigger.Response:
    """Copy what the streams hold, write it, and name what was written, or say why nothing was.

    :param folder: where; empty is beside ROS's logs.
    :param about: what is told of the node.
    """
    where = Path(folder or rclpy.logging.get_logging_directory() / "flow_snapshots").expanduser()

    def write() -> list[str]:
        copies = worker.call(lambda: [camera.snapshot() for camera in cameras], TIMEOUT_S)
        return [str(write_snapshot(where, copy, about)) for copy in copies if copy is not None]

    try:
        paths = await process.in_a_thread(write, executor, "snapshot")
        response.success = bool(paths)
        response.message = ", ".join(paths) or "no stream yet: no image has been processed"
    except TimeoutError as error:
        response.success, response.message = False, f"no snapshot, the frame in hand takes too long: {error}"
    except Exception as error:
        response.success, response.message = False, f"cannot write into {where}: {process.words_of(error)}"
    return response
