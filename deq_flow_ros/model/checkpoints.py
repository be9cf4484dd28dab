# SPDX-License-Identifier: Apache-2.0
"""The tensors of weights files: in the safetensors format, and in the key layout of the method's authors.

The library of the format (https://huggingface.co/docs/safetensors) is in neither Ubuntu nor rosdep, and a robot may
have only what apt installs. A test compares what is read and written here with what the library does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deq_flow_ros.model.architecture import Architecture
from deq_flow_ros.model.deq_flow import DEQFlow
from deq_flow_ros.model.weight_norm import DIRECTION, MAGNITUDE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of weights
_FORMAT = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_METADATA = "__metadata__"
_LONGEST_HEADER = 100 << 20  # the format allows no longer one; the length in a file of another kind can be anything
_PREFIX = "module."  # left over from training on several GPUs; all released checkpoints have it


class WeightsError(ValueError):
    """A weights file cannot be used; the message says why."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and the metadata of its header.

    :raises WeightsError: if the file cannot be read, is damaged, or is of another kind.
    """
    try:
        return _parse(bytearray(path.read_bytes()))  # PyTorch wants memory that may be written to
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def _parse(content: bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A length, a header, and the numbers."""
    start = 8 + int.from_bytes(content[:8], "little")
    if len(content) < start or start > _LONGEST_HEADER:
        raise ValueError(f"it has {len(content)} bytes, fewer than its first 8 announce for the header alone")
    try:
        header = json.loads(content[8:start])
        metadata = header.pop(_METADATA, {})
        entries = {name: (_FORMAT[e["dtype"]], e["shape"], *e["data_offsets"]) for name, e in header.items()}
        if not all(isinstance(n, int) and n >= 0 for _, shape, *ends in entries.values() for n in (*shape, *ends)):
            raise ValueError("expected counts in all shapes and offsets")
        end = start + max((last for _, _, _, last in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # ValueError: also no UTF-8, no JSON
        raise ValueError(f"its header cannot be read: {type(error).__name__}: {error}") from None
    if len(content) != end:
        raise ValueError(f"it has {len(content)} bytes, and its header describes {end}")
    tensors = {}
    for name, (dtype, shape, first, last) in entries.items():
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its header gives {name} the shape {shape} and {last - first} bytes")
        # Copied, because numbers of several bytes must lie at a multiple of their size.
        numbers = content[start + first : start + last]
        flat = torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors, metadata


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of tensors that lie on the CPU."""
    names = {dtype: name for name, dtype in _FORMAT.items()}
    # Large elements first, so that each tensor lies at a multiple of the size of its elements.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    numbers = (tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name in order)
    return b"".join((len(text).to_bytes(8, "little"), text, *numbers))


def check_layout(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse tensors that are not exactly the expected ones, except that numbers may have any type of ``DTYPES``.

    :raises WeightsError: naming the file and the tensors that are missing, unexpected, or of the wrong shape or type.
    """
    problems = [f"missing: {name}" for name in expected if name not in got]
    problems += [f"unexpected: {name}" for name in got if name not in expected]
    for name in (name for name in expected if name in got):
        tensor, like = got[name], expected[name]
        # float64 would silently lose digits. Counters are integers, of exactly one type.
        types = tuple(DTYPES.values()) if like.is_floating_point() else (like.dtype,)
        if tensor.shape != like.shape:
            problems.append(f"wrong shape: {name} is {tuple(tensor.shape)}, expected {tuple(like.shape)}")
        elif tensor.dtype not in types:
            problems.append(f"wrong type: {name} is {tensor.dtype}, expected {' or '.join(map(str, types))}")
    if problems:
        listed = "\n  ".join(problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise WeightsError(f"{path} does not fit its architecture:\n  {listed}{more}")


def from_released(
    state_dict: Mapping[str, Tensor], path: str | Path = "checkpoint"
) -> tuple[Architecture, dict[str, Tensor]]:
    """Convert tensors in the released key layout to the architecture and the tensors of this project's model.

    Keys and shapes give the architecture; weight normalisation is kept. If a tensor has two names, ``norm3`` and
    ``downsample.1``, the second one is read.

    :param path: the file, to be named in errors.
    :raises WeightsError: if the layout is another one, see ``check_layout``.
    """
    tensors = dict(state_dict)
    if all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    architecture = _read_architecture(tensors, path)
    with torch.device("meta"):  # shapes only
        expected = DEQFlow(architecture).state_dict()
    own_names = {released: own for own in expected for released in _released_names(own)}
    check_layout({released: expected[own] for released, own in own_names.items()}, tensors, path)
    return architecture, {own: tensors[_released_names(own)[-1]] for own in expected}


def to_released(model: DEQFlow) -> dict[str, Tensor]:
    """The tensors of a model in the released key layout, which has no place for the head for the uncertainty.

    :raises ValueError: for an architecture that this layout cannot express; the message says why.
    """
    a = model.architecture
    problems = []
    if a.encoder != "separate":
        problems.append(f"it has two encoders, this model one of kind {a.encoder!r}")
    if a.update not in ("raft", "gma"):
        problems.append(f"its update operator is 'raft' or 'gma', this model's is {a.update!r}")
    levels, radius = a.correlation_levels, a.correlation_radius
    if (levels, radius) != (4, 4):
        problems.append(f"it has 4 levels of correlation with radius 4, this model {levels} with radius {radius}")
    if problems:
        raise ValueError(f"the released layout cannot hold this model: {'; '.join(problems)}")
    return {
        _PREFIX + released: tensor.detach().cpu().contiguous().clone()
        for own, tensor in model.state_dict().items()
        if not own.startswith("uncertainty.")
        for released in _released_names(own)
    }


def _released_names(own: str) -> list[str]:
    """The names that a tensor of ``DEQFlow.state_dict()`` has in the released layout."""
    name = own.removeprefix("encoder.").replace("update_block.attention.", "attn.")
    name = name.replace(MAGNITUDE, "weight_g").replace(DIRECTION, "weight_v")
    return [name.replace(".downsample.1.", ".norm3."), name] if ".downsample.1." in name else [name]


def _read_architecture(tensors: Mapping[str, Tensor], path: str | Path) -> Architecture:
    # If only some convolutions are normalised, ``check_layout`` names the tensors that the others lack.
    weight_norm = any(name.startswith("update_block.") and name.endswith(".weight_v") for name in tensors)
    kernel = "weight_v" if weight_norm else "weight"

    def channels(name: str, dimension: int = 0) -> int:
        if name not in tensors or tensors[name].dim() != 4:
            got = tuple(tensors[name].shape) if name in tensors else f"none beside {sorted(tensors)[:3]} ..."
            wanted = f"expected a tensor {name!r} of 4 dimensions, got {got}"
            raise WeightsError(f"{path} is not a checkpoint in the released layout: {wanted}")
        return tensors[name].shape[dimension]

    c1, c2, f1, f2 = (channels(f"update_block.encoder.conv{each}.{kernel}") for each in ("c1", "c2", "f1", "f2"))
    hidden, inputs = (channels(f"update_block.gru.convz1.{kernel}", dimension) for dimension in (0, 1))
    # The inputs of the GRU are the hidden state, the context and the motion features, and with global motion
    # aggregation also the aggregated features; all are equally wide. Keys alone would be no proof.
    operators = {3 * hidden: "raft", 4 * hidden: "gma"}
    if inputs not in operators:
        raise WeightsError(
            f"{path}: wrong shape: update_block.gru.convz1.{kernel} takes {inputs} channels, expected {3 * hidden} "
            f"(or {4 * hidden} with global motion aggregation) for a hidden state of {hidden}"
        )
    return Architecture(
        encoder="separate", feature_dim=channels("fnet.conv2.weight"), hidden_dim=hidden,
        motion_widths=(c1, c2, f1, f2), flow_head_dim=channels(f"update_block.flow_head.conv1.{kernel}"),
        mask_dim=channels("mask.0.weight"), update=operators[inputs], weight_norm=weight_norm,
    )  # fmt: skip
