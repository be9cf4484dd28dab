# SPDX-License-Identifier: Apache-2.0
"""The state of a training run on disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from deq_flow_ros.model.weights import replace_file


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a crash or full disk leaves the old one whole."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            torch.save(state, file)

    replace_file(path, write)


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
