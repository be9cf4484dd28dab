# SPDX-License-Identifier: Apache-2.0
"""Models from weights files: those that ship, files of this project and released checkpoints; and their precision."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deq_flow_ros import did_you_mean
from deq_flow_ros.host import replacing
from deq_flow_ros.model import checkpoints
from deq_flow_ros.model.architecture import Architecture
from deq_flow_ros.model.checkpoints import DTYPES, WeightsError
from deq_flow_ros.model.deq_flow import DEQFlow
from deq_flow_ros.model.encoders import Int8Encoder

PRECISIONS = ("auto", *DTYPES, "int8")
WEIGHTS_DIR = Path(__file__).parent / "weights"
_ARCHITECTURE_KEY = "deq_flow_ros.architecture"
_CPU_INFO = Path("/proc/cpuinfo")


def choose_precision(precision: str, device: str | torch.device) -> str:
    """The name of a precision: the given one, or the one that "auto" stands for on this device.

    "auto" is float16 on CUDA, bfloat16 on a CPU with instructions for it, and float32 on other CPUs. "int8" is an
    encoder of int8, the rest as with "auto". The flow itself is always float32. docs/speed.md says how they differ.

    :raises ValueError: for an unknown name, or int8 where the device or PyTorch has none.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision out of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "int8" and (missing := _why_no_int8(str(device))):
        raise ValueError(f"the precision int8 {missing}; expected auto, {', '.join(DTYPES)}")
    if precision != "auto":
        return precision
    if str(device) != "cpu":
        return "float16"
    # Without AVX512-BF16 or AMX, PyTorch converts each product.
    return "float32" if {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_flags()) else "bfloat16"


def _why_no_int8(device: str) -> str:
    """What is missing here for convolutions of int8; "" if nothing is."""
    if device != "cpu":
        return f"computes on a CPU alone, got the device {device}"
    if {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(_cpu_flags()):
        return "needs a processor with AVX512-VNNI, AVX-VNNI or AMX, which this one lacks"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return f"needs oneDNN's onednn::qconv2d_pointwise, which PyTorch {torch.__version__} here lacks"
    return ""


@cache
def _cpu_flags() -> frozenset[str]:
    found = re.search(r"^flags\b.*", _CPU_INFO.read_text(), re.MULTILINE) if _CPU_INFO.exists() else None
    return frozenset(found[0].split() if found else ())


def available_models() -> list[str]:
    """The names of the models whose weights ship with the package."""
    return sorted(path.stem for path in WEIGHTS_DIR.glob("*.safetensors"))


def load_model(
    name_or_path: str | Path, device: str | torch.device = "cpu", *, fold: bool = True, precision: str = "float32"
) -> DEQFlow:
    """Load a model that is ready for inference.

    :param name_or_path: a name out of ``available_models()``, a ``.safetensors`` file of this project, or a checkpoint
        in the released key layout (``.pth``), whose architecture is read off its keys and shapes.
    :param device: "cpu", "cuda" or "cuda:N".
    :param fold: whether to fold weight norm and batch norm into the convolutions, which makes inference cheaper. False
        keeps them, to train further (after ``model.train().requires_grad_(True)``), to save or to export.
    :param precision: type of weights and features: float32, bfloat16, float16, int8, or auto; see ``choose_precision``.
    :raises FileNotFoundError: if there is no such name or file.
    :raises WeightsError: for a file that may not be read, is truncated, of another kind, or does not fit its
        architecture.
    :raises RuntimeError: if the device is not available.
    :raises ValueError: for a precision that is unknown, or that machine or model do not have.
    """
    device = check_device(device)
    precision = choose_precision(precision, device)
    dtype = DTYPES[choose_precision("auto", device) if precision == "int8" else precision]
    path, name, shipped = Path(name_or_path).expanduser(), str(name_or_path), available_models()
    if name in shipped:
        path = WEIGHTS_DIR / f"{name}.safetensors"
    if not path.is_file():
        what = f"no weights {name!r}{did_you_mean(name, shipped)}: neither a file nor a model of this package"
        raise FileNotFoundError(f"{what}, which has: {', '.join(shipped) or 'none'}")
    if not os.access(path, os.R_OK):  # the readers would take it for a damaged file
        raise WeightsError(f"{path} may not be read: this user lacks the permission")
    if path.suffix == ".safetensors":
        architecture, tensors = _read_own(path)
    else:
        architecture, tensors = checkpoints.from_released(_read_pickle(path), path)
    try:
        model = DEQFlow(architecture)
    except (ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{path} describes a model that cannot be made here: {error}") from error
    checkpoints.check_layout(model.state_dict(), tensors, path)
    if odd := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise WeightsError(f"{path} is damaged: {len(odd)} of its tensors hold NaN or infinity, the first is {odd[0]}")
    model.load_state_dict(tensors)
    model.eval()
    if fold:
        model = model.folded()
    if precision == "int8":
        model.encoder = Int8Encoder(model.encoder, dtype)
    return model.to(device, dtype).requires_grad_(False)


def check_device(device: str | torch.device) -> torch.device:
    """The device "cpu", "cuda" or "cuda:N"; ``RuntimeError`` if it is another, or if this machine has none such."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):  # PyTorch's own error lists all kinds of devices
        raise RuntimeError(f"expected the device cpu, cuda or cuda:N, got {str(device)!r}")
    device = torch.device(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RuntimeError(
            f"device {str(device)!r} asked for, but PyTorch {torch.__version__} sees {count or 'no'} CUDA device(s) "
            "here; install a CUDA build of PyTorch and its driver, or ask for a device that is there, such as 'cpu'"
        )
    return device


def save_model(
    model: DEQFlow, path: str | Path, metadata: Mapping[str, str] | None = None, *, precision: str | None = None
) -> None:
    """Write a ``.safetensors`` file that ``load_model`` reads. An old file stays intact until the new one is complete.

    :param metadata: strings to store in the file beside the architecture.
    :param precision: type of the stored weights: float32, bfloat16 or float16; None: that of the model. Biases, the
        parameters of normalisation layers and weights with a value beyond the range of the type keep that of the model.
    :raises ValueError: for a folded model, which lacks tensors that the file must hold, or an unknown precision.
    """
    if precision is not None and precision not in DTYPES:
        raise ValueError(f"expected a precision out of {', '.join(DTYPES)}, got {precision!r}")
    dtype = None if precision is None else DTYPES[precision]
    tensors = {name: _stored(tensor.detach(), dtype) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        whole = DEQFlow(model.architecture).state_dict()
    if tensors.keys() != whole.keys():
        raise ValueError(f"cannot save {path}: this model is folded for inference; load it with fold=False to save it")
    header = {**(metadata or {}), _ARCHITECTURE_KEY: json.dumps(asdict(model.architecture))}
    replace_file(Path(path), checkpoints.to_safetensors(tensors, header))


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of the tensor on the CPU, in ``dtype`` if ``save_model`` stores it so."""
    tensor = tensor.cpu().contiguous().clone()
    if dtype is None or not tensor.is_floating_point():
        return tensor
    unfit = tensor.dim() < 2 or tensor.abs().max() > torch.finfo(dtype).max
    return tensor if unfit and dtype.itemsize < tensor.dtype.itemsize else tensor.to(dtype)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside the old one, flush it to the disk, then move it to its place.

    :raises OSError: if the file cannot be written; the message names it. The old one is intact then.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        reason = f"cannot write {path}, what was there before is untouched: {error.strerror}"
        raise OSError(error.errno, reason) from error


def _read_own(path: Path) -> tuple[Architecture, dict[str, Tensor]]:
    tensors, metadata = checkpoints.read_safetensors(path)
    if _ARCHITECTURE_KEY not in metadata:
        reason = f"its metadata has no {_ARCHITECTURE_KEY!r}; it holds {sorted(tensors)[:3]} ..."
        raise WeightsError(f"{path} is a safetensors file of something else: {reason}")
    try:
        return Architecture.from_dict(json.loads(metadata[_ARCHITECTURE_KEY])), tensors
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} describes an architecture that this version does not know: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes of any other file may raise any
        # PyTorch advises to load it with all that it contains, code included; pickle says "101" of a text file.
        other = "it is not in PyTorch's format, was cut short, or contains more than tensors"
        reason = str(error) if isinstance(error, OSError) else other
        raise WeightsError(f"{path} is not a whole PyTorch checkpoint: {reason}") from error
    mapping = isinstance(content, Mapping)
    if not mapping or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        kind = f"a mapping with {sorted(map(str, content))[:5]}" if mapping else type(content)
        raise WeightsError(f"{path} must hold a mapping of names to tensors in the released layout, it holds {kind}")
    return dict(content)
