# SPDX-License-Identifier: Apache-2.0
"""The number types of weights and features, and which of them suits a processor.

``is_compiling`` and ``is_autocast_enabled`` work with PyTorch from 2.1 on, the oldest that this package runs with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"
PRECISIONS = ("auto", *DTYPES, INT8)
_CPU_INFO = Path("/proc/cpuinfo")


def choose_precision(precision: str, device: str | torch.device) -> str:
    """The name of a precision: the given one, or the one that "auto" stands for on this device.

    "auto" is float16 on CUDA, bfloat16 on a CPU with instructions for it, and float32 on other CPUs. "int8" is an
    encoder of int8, the rest as with "auto". The flow itself is always float32. The flow of float32 and bfloat16
    differs by about 0.02 px on average, that of int8 by 0.05 px (docs/speed.md).

    :raises ValueError: for an unknown name, or int8 where the device or PyTorch has none.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision out of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == INT8:
        missing = f"computes on a CPU alone, got the device {device}" if str(device) != "cpu" else _why_no_int8()
        if missing:
            raise ValueError(f"the precision int8 {missing}; expected auto, {', '.join(DTYPES)}")
    if precision != "auto":
        return precision
    if str(device) != "cpu":
        return "float16"
    # Without AVX512-BF16 or AMX, PyTorch converts each product.
    return "float32" if {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_flags()) else "bfloat16"


def number_type(precision: str) -> torch.dtype:
    """The type of weights and features in a precision that ``choose_precision`` named."""
    return DTYPES[choose_precision("auto", "cpu") if precision == INT8 else precision]


def _why_no_int8() -> str:
    """What is missing here for convolutions of int8; "" if nothing is."""
    if {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(_cpu_flags()):
        return "needs a processor with AVX512-VNNI, AVX-VNNI or AMX, which this one lacks"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return f"needs oneDNN's onednn::qconv2d_pointwise, which PyTorch {torch.__version__} here lacks"
    return ""


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


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
