# SPDX-License-Identifier: Apache-2.0
"""The state of a training run on disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from deq_flow_ros.model.weights import replace_file

_REQUIRED = {"step", "seconds", "steps", "cooldown", "model", "ema", "optimizer", "architecture"}
_LATER = {"samples": None, "best": None, "clips": None, "use": 0, "stage": 0, "tail": 0.0}
"""What checkpoints of before did not have, see `Run`: all their samples were clips used once, in one stage."""


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a crash or full disk leaves the old one whole.

    :raises OSError: if it cannot be written, naming it.
    """

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            torch.save(state, file)

    replace_file(path, write)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Run.save` wrote, now or before there were all of today's keys; tensors on the CPU.

    :raises ValueError: if the file is not such.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole training checkpoint: {str(error).splitlines()[0]}") from error
    missing = _REQUIRED - set(state) if isinstance(state, dict) else _REQUIRED
    if missing:
        raise ValueError(f"{path} is not a training checkpoint: it has no {', '.join(sorted(missing))}")
    return {**_LATER, **state}
