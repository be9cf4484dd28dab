# SPDX-License-Identifier: Apache-2.0
"""A folder that holds all of one flow field, for a bug report: what went in, what came out, and how it came about."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
import rclpy.logging
import torch
from rclpy.executors import Executor
from std_srvs.srv import Trigger

from deq_flow_ros.host import versions
from deq_flow_ros.imaging.pictures import flow_to_color
from deq_flow_ros.recordings.flow_files import write_flow
from deq_flow_ros.ros import process


@dataclass(frozen=True)
class Snapshot:
    """What a stream holds, to be written.

    :ivar arrays: those of ``FlowEstimator.snapshot``.
    :ivar flow: (H, W, 2) px, of the last pair.
    :ivar residual: (H, W) px, of the last pair.
    :ivar metadata: whose it is, and how the flow came about.
    """

    arrays: Mapping[str, np.ndarray]
    flow: np.ndarray | None
    residual: np.ndarray | None
    metadata: Mapping[str, Any]


def write_snapshot(folder: Path, snapshot: Snapshot, about: Mapping[str, Any]) -> Path:
    """Write a new folder ``snapshot_TIME[_N]`` into ``folder``, which is made where it is missing; returns the new one.

    It holds each (H, W, 3) uint8 RGB array as ``NAME.png``, the others in ``state.npz``; the flow as ``flow.flo``
    (exact; NaN becomes "unknown") and as colours in ``flow.png``; the residual as ``residual`` in ``state.npz``; the
    metadata, ``about`` and the versions of what is installed in ``snapshot.json``, where what JSON cannot hold stands
    as text. Nothing that exists is overwritten.

    :raises OSError: if something cannot be written, like ``MediaError``; no folder is left then.
    """
    target = _new_folder(folder.expanduser())
    try:
        state = dict(snapshot.arrays)
        for name, array in snapshot.arrays.items():
            if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
                _write_png(target / f"{name}.png", state.pop(name))
        if snapshot.residual is not None:
            state["residual"] = snapshot.residual
        if snapshot.flow is not None:
            write_flow(target / "flow.flo", snapshot.flow)
            _write_png(target / "flow.png", flow_to_color(snapshot.flow))
        np.savez_compressed(target / "state.npz", **state)  # type: ignore[arg-type]  # its stub takes bool alone
        text = json.dumps({**_plain({**about, **snapshot.metadata}), "versions": software()}, indent=2, allow_nan=False)
        (target / "snapshot.json").write_text(text + "\n")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)  # half a snapshot would be taken for a whole one
        raise
    return target


def software() -> dict[str, str]:
    """What a report about this process must say of the software below it."""
    return {
        **versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cuda": torch.version.cuda or "none",
        "opencv": cv2.__version__,
        "ros_distro": os.environ.get("ROS_DISTRO", "unknown"),
        "rmw": rclpy.get_rmw_implementation_identifier(),
    }


def _new_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"snapshot_{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    number = 1
    while True:
        target = folder / (name if number == 1 else f"{name}_{number}")
        try:
            target.mkdir()
            return target
        except FileExistsError:
            number += 1


def _write_png(path: Path, rgb: np.ndarray) -> None:
    # Fastest compression: the caller waits, and a folder for a bug report is packed anyway.
    written, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not written:
        raise OSError(f"cannot encode {path.name}: shape {rgb.shape}")
    path.write_bytes(data.tobytes())  # unlike cv2.imwrite, it says why it failed


def _plain(value: Any) -> Any:
    """What JSON can hold; NaN and infinity, which it cannot, and all else become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


async def answer(
    response: Trigger.Response,
    copies: Callable[[], Sequence[Snapshot | None]],
    folder: str,
    about: Mapping[str, Any],
    executor: Executor | None,
) -> Trigger.Response:
    """Answer the service ``~/snapshot``: copy, write, and name what was written, or say why nothing was.

    The executor takes up other work meanwhile.

    :param copies: makes a copy of what each stream holds, if it holds anything; raises TimeoutError where it cannot.
    :param folder: where; empty is beside ROS's logs.
    :param about: what is told of the node.
    """
    where = Path(folder or rclpy.logging.get_logging_directory() / "flow_snapshots").expanduser()

    def write() -> list[str]:
        return [str(write_snapshot(where, copy, about)) for copy in copies() if copy is not None]

    try:
        paths = await process.in_a_thread(write, executor, "snapshot")
        response.success = bool(paths)
        response.message = ", ".join(paths) or "no stream yet: no image has been processed"
    except TimeoutError as error:
        response.success, response.message = (
            False,
            f"no snapshot, the frames in hand take too long, or the node is stopping: {error}",
        )
    except Exception as error:
        response.success, response.message = False, f"cannot write into {where}: {process.words_of(error)}"
    return response
