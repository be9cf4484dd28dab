# SPDX-License-Identifier: Apache-2.0
"""What the node tells of its process: a status for ``/diagnostics``, and a folder that holds all of one flow field, for
a bug report: what went in, what came out, and how it came about.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticStatus

from deq_flow_ros.host import versions
from deq_flow_ros.imaging.pictures import flow_to_color
from deq_flow_ros.recordings.flow_files import write_flow
from deq_flow_ros.ros.process import status_of


class ProcessStatus:
    """What a process works with and takes, for ``/diagnostics``.

    :param name: of the status.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()
        self._failure: str | None = None
        self._device: torch.device | None = None
        self._about: dict[str, str] = {}

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
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        rss, peak = (int(lines[key].split()[0]) * 1.024e-3 for key in ("VmRSS", "VmHWM"))  # kB of 1024 bytes; MB of 1e6
        device = "" if self._device is None else str(self._device)
        values = {"device": device, **self._about, "cpu_cores_used": f"{cores:.2f}"}
        values |= {"rss_mb": f"{rss:.1f}", "rss_peak_mb": f"{peak:.1f}"}
        level, message = DiagnosticStatus.OK, "not configured"
        if self._failure is not None:
            level, message = DiagnosticStatus.ERROR, self._failure
        elif self._device is not None:
            message = f"{self._about['model']} on {device}, {cores:.1f} processor cores busy, {rss:.0f} MB"
            if self._device.type == "cuda":
                cuda = torch.cuda
                taken = (cuda.memory_allocated, cuda.max_memory_allocated, cuda.memory_reserved)
                for name, read in zip(("allocated", "peak", "reserved"), taken, strict=True):
                    values[f"cuda_{name}_mb"] = f"{read(self._device) / 1e6:.1f}"
                values["device_name"] = cuda.get_device_name(self._device)
                message += f", {values['cuda_allocated_mb']} MB on the device"
        return status_of(level, self._name, message, device, values)


def write_snapshot(folder: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Path:
    """Write a new folder ``snapshot_TIME`` into ``folder``, which is made where it is missing; returns the new one.

    It holds each (H, W, 3) uint8 RGB array as ``NAME.png``, the flow as ``flow.flo`` (exact; NaN becomes "unknown") and
    as colours in ``flow.png``, and the others in ``state.npz``; ``about`` and the versions of what is installed in
    ``snapshot.json``, where what JSON cannot hold stands as text.

    :param arrays: those of ``FlowEstimator.snapshot``, and of the last pair ``flow`` (H, W, 2) and ``residual`` (H, W),
        px, where there is one.
    :raises OSError: if something cannot be written, like ``MediaError``; no folder is left then.
    """
    target = folder / f"snapshot_{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}"
    target.mkdir(parents=True)
    try:
        state = {}
        for name, array in arrays.items():
            if name == "flow":
                write_flow(target / "flow.flo", array)
                _write_png(target / "flow.png", flow_to_color(array))
            elif array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
                _write_png(target / f"{name}.png", array)
            else:
                state[name] = array
        np.savez_compressed(target / "state.npz", **state)  # type: ignore[arg-type]  # its stub takes bool alone
        told = json.dumps({**about, "versions": software()}, default=_plain)
        plain = json.loads(told, parse_constant=str.lower)  # NaN is no JSON
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
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)
