# SPDX-License-Identifier: Apache-2.0
"""Reading and writing of the safetensors format, https://huggingface.co/docs/safetensors: a length, a header, numbers.

The library of that format is in neither Ubuntu nor rosdep, and a robot may have only what apt installs. A test compares
what this module reads and writes with what the library does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_METADATA = "__metadata__"
_LONGEST_HEADER = 100 << 20
"""The format allows no longer one; the length in a file of another kind can be anything."""


class FormatError(ValueError):
    """A file is not in the safetensors format, or not whole; the message says where."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the metadata of its header.

    :raises FormatError: if the file is damaged, or of another kind.
    :raises OSError: if it cannot be read.
    """
    content = bytearray(path.read_bytes())  # PyTorch wants memory that may be written to
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(len(content) - 8, _LONGEST_HEADER):
        raise FormatError(f"it has {len(content)} bytes, fewer than its first 8 announce for the header alone")
    try:
        header = json.loads(content[8 : 8 + length])
        metadata = header.pop(_METADATA, {})
        entries = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # ValueError: also no UTF-8, no JSON
        raise FormatError(f"its header cannot be read: {type(error).__name__}: {error}") from None
    end = max((stop for _, _, _, stop in entries.values()), default=0)
    if 8 + length + end != len(content):
        raise FormatError(f"it has {len(content)} bytes, and its header describes {8 + length + end}")
    tensors = {}
    for name, (dtype, shape, start, stop) in entries.items():
        count = math.prod(shape)
        if stop - start != count * torch.empty(0, dtype=dtype).element_size():
            raise FormatError(f"its header gives {name} the shape {shape} and {stop - start} bytes")
        # Copied, because numbers of several bytes must lie at a multiple of their size.
        numbers = content[8 + length + start : 8 + length + stop]
        flat = torch.frombuffer(numbers, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors, metadata


def _entry(entry: Mapping[str, Any]) -> tuple[torch.dtype, list[int], int, int]:
    """Type, shape, and first byte and end in the numbers, of one tensor in a header."""
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"expected counts, got {shape} and {entry['data_offsets']}")
    return _TYPES[entry["dtype"]], shape, start, stop


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors that lie on the CPU, and texts.

    :raises OSError: if the file cannot be written.
    """
    names = {dtype: name for name, dtype in _TYPES.items()}
    # Large elements first, so that each tensor lies at a multiple of the size of its elements.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
