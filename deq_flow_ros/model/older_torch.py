# SPDX-License-Identifier: Apache-2.0
"""What PyTorch 2.1, the oldest that this package runs with, has under other names or not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch

is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", lambda: False)
"""Whether PyTorch's compiler reads the code just now. Before 2.3 it is not used, see ``why_not_compiled``."""


def _is_autocast_enabled(device_type: str) -> bool:
    return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def _takes_device_types() -> bool:
    try:
        torch.is_autocast_enabled("cpu")
    except TypeError:  # before 2.4
        return False
    return True


is_autocast_enabled: Callable[[str], bool] = (
    torch.is_autocast_enabled if _takes_device_types() else _is_autocast_enabled
)
"""Whether operations on this kind of device run at a lower precision just now."""
