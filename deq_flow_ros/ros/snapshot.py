# SPDX-License-Identifier: Apache-2.0
"""A folder for a bug report that holds all of one flow field: what went in, what came out, and how it came about."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
import torch

from deq_flow_ros.host import versions
from deq_flow_ros.imaging.pictures import flow_to_color
from deq_flow_ros.recordings.flow_files import write_flow


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
        software = {
            **versions(), "platform": platform.platform(), "cuda": torch.version.cuda or "none",
            "opencv": cv2.__version__, "ros_distro": os.environ.get("ROS_DISTRO", "unknown"),
            "rmw": rclpy.get_rmw_implementation_identifier(),
        }  # fmt: skip
        told = json.dumps({**about, "versions": software}, default=_plain)
        plain = json.loads(told, parse_constant=str.lower)  # NaN is no JSON
        (target / "snapshot.json").write_text(json.dumps(plain, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)  # half a snapshot would be taken for a whole one
        raise
    return target


def _write_png(path: Path, rgb: np.ndarray) -> None:
    # Fastest compression: the caller waits, and a folder for a bug report is packed anyway.
    written, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not written:
        raise OSError(f"cannot encode {path.name}: shape {rgb.shape}")
    path.write_bytes(data.tobytes())  # unlike cv2.imwrite, it says why it failed


def _plain(value: Any) -> Any:
    """What JSON can hold for something that it cannot."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)
