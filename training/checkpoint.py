# SPDX-License-Identifier: Apache-2.0
"""The state of a training run on disk."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write beside the old file, flush to the disk, then replace it: a crash or full disk leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What ``write_checkpoint`` wrote.

    :raises ValueError: if the file is not such.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole training checkpoint: {str(error).splitlines()[0]}") from error
    missing = {"step", "model", "ema", "optimizer", "architecture"} - set(state)
    if missing:
        raise ValueError(f"{path} is not a training checkpoint: it has no {', '.join(sorted(missing))}")
    return dict(state)
