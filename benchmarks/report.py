# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: the clock, and what ``--json`` writes, the figures and where they were taken."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def clock_s(device: torch.device) -> float:
    """Processor time on a CPU, which a busy neighbour does not lengthen; on a GPU wall time, its queue emptied, s."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def write_json(path: Path, device: torch.device, figures: dict[str, Any]) -> None:
    """Write the figures with device, threads and version beside them; what is infinite or NaN becomes null."""
    cuda = device.type == "cuda"
    where = {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(where | figures), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
