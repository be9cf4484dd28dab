# SPDX-License-Identifier: Apache-2.0
"""What the node tells of its process: a status for ``/diagnostics``, and a folder that holds all of one flow field, for
a bug report: what went in, what came out, and how it came about.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
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
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.executors import Executor
from std_srvs.srv import Trigger

from deq_flow_ros.host import versions
from deq_flow_ros.imaging.pictures import flow_to_color
from deq_flow_ros.recordings.flow_files import write_flow
from deq_flow_ros.ros import process


class ProcessStatus:
    """What a process works with and takes, for ``/diagnostics``.

    :param name: of the status.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._failure: str | None = None
        self._device: torch.device | None = None
        self._about: dict[str, str] = {}
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()

    def configured(self, device: torch.device, model: str, **about: object) -> None:
        """What the process works with: device, model, and what else is worth knowing (``threads=1``)."""
        self._failure, self._device = None, device
        self._about = {"model": model, **{name: str(value) for name, value in about.items()}}

    def cleaned_up(self, failure: str | None = None) -> None:
        """The node is unconfigured (again), or could not be configured for the reason given."""
        self._failure, self._device, self._about = failure, None, {}

    def status(self) -> DiagnosticStatus:
        """What the process works with and takes, or why it does not work."""
        now_cpu_s, now_wall_s = time.process_time(), time.monotonic()
        cores = (now_cpu_s - self._cpu_s) / max(1e-3, now_wall_s - self._wall_s)
        self._cpu_s, self._wall_s = now_cpu_s, now_wall_s
        memory = memory_mb(self._device)
        device = "" if self._device is None else str(self._device)
        values = {"device": device, **self._about, "cpu_cores_used": f"{cores:.2f}"}
        values |= {f"{name}_mb": f"{value:.1f}" for name, value in memory.items()}
        level, message = DiagnosticStatus.OK, "not configured"
        if self._failure is not None:
            level, message = DiagnosticStatus.ERROR, self._failure
        elif self._device is not None:
            message = f"{self._about['model']} on {device}, {cores:.1f} processor cores busy, {memory['rss']:.0f} MB"
            if self._device.type == "cuda":
                values["device_name"] = torch.cuda.get_device_name(self._device)
                message += f", {memory['cuda_allocated']:.0f} MB on the device"
        return process.status_of(level, self._name, message, device, values)


def memory_mb(device: torch.device | None) -> dict[str, float]:
    """Memory of this process in MB (10^6 bytes): ``rss`` now and ``rss_peak``, on CUDA also what tensors take there."""
    status = Path("/proc/self/status").read_text()
    kilobytes = {name: int(value) for name, value in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.MULTILINE)}
    memory = {"rss": kilobytes["VmRSS"] * 1.024e-3, "rss_peak": kilobytes["VmHWM"] * 1.024e-3}
    if device is not None and device.type == "cuda":
        memory["cuda_allocated"] = torch.cuda.memory_allocated(device) / 1e6
        memory["cuda_peak"] = torch.cuda.max_memory_allocated(device) / 1e6
        memory["cuda_reserved"] = torch.cuda.memory_reserved(device) / 1e6
    return memory


@dataclass(frozen=True)
class Snapshot:
    """What a stream holds, to be written.

    :ivar arrays: those of ``FlowEstimator.snapshot``, and of the last pair ``flow`` (H, W, 2) and ``residual`` (H, W),
        px, where there is one.
    :ivar metadata: whose it is, and how the flow came about.
    """

    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]


def write_snapshot(folder: Path, snapshot: Snapshot, about: Mapping[str, Any]) -> Path:
    """Write a new folder ``snapshot_TIME`` into ``folder``, which is made where it is missing; returns the new one.

    It holds each (H, W, 3) uint8 RGB array as ``NAME.png``, the flow as ``flow.flo`` (exact; NaN becomes "unknown") and
    as colours in ``flow.png``, and the others in ``state.npz``; the metadata, ``about`` and the versions of what is
    installed in ``snapshot.json``, where what JSON cannot hold stands as text.

    :raises OSError: if something cannot be written, like ``MediaError``; no folder is left then.
    """
    target = folder.expanduser() / f"snapshot_{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}"
    target.mkdir(parents=True)
    try:
        state = {}
        for name, array in snapshot.arrays.items():
            if name == "flow":
                write_flow(target / "flow.flo", array)
                _write_png(target / "flow.png", flow_to_color(array))
            elif array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
                _write_png(target / f"{name}.png", array)
            else:
                state[name] = array
        np.savez_compressed(target / "state.npz", **state)  # type: ignore[arg-type]  # its stub takes bool alone
        told = {**about, **snapshot.metadata, "versions": software()}
        plain = json.loads(json.dumps(told, default=_plain), parse_constant=str.lower)  # NaN is no JSON
        (target / "snapshot.json").write_text(json.dumps(plain, indent=2) + "\n")
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


def _write_png(path: Path, rgb: np.ndarray) -> None:
    # Fastest compression: the caller waits, and a folder for a bug report is packed anyway.
    written, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not written:
        raise OSError(f"cannot encode {path.name}: shape {rgb.shape}")
    path.write_bytes(data.tobytes())  # unlike cv2.imwrite, it says why it failed


def _plain(value: Any) -> Any:
    """What JSON can hold for something that it cannot."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


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
        response.success = False
        response.message = f"no snapshot, the frames in hand take too long, or the node is stopping: {error}"
    except Exception as error:
        response.success, response.message = False, f"cannot write into {where}: {process.words_of(error)}"
    return response
