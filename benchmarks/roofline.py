# SPDX-License-Identifier: Apache-2.0
"""How near the stages of one field of a stream come to what the machine can do (Williams et al., CACM 52, 2009).

Operations are those of convolutions and matrix products, a multiplication and an addition counted as two, as PyTorch's
own counter has them. Bytes are what every operation of PyTorch reads and writes, each tensor once: parameters,
activations, and all that passes between operations. Views move nothing, and of a gather only what is taken is read.
What is still in a cache from the operation before is counted all the same.

The peaks are measured, with the threads and the type of the run: a product of large matrices, and a copy of a block
larger than the caches (its bytes both read and written). A stage takes no less than its operations at the one peak,
and its bytes, if they come from memory, at the other; the longer of both is its limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import table
from deq_flow_ros.equilibrium import State, solve
from deq_flow_ros.model import DEQFlow, update_px
from deq_flow_ros.model.cells import likeness
from deq_flow_ros.streaming.eager import LOOKUPS, encode_images
from deq_flow_ros.streaming.warm_start import carry

STAGES = ("encode", "prepare", "match", "correlate", "iteration", "upsample")
GATHERS = ("gather", "index", "index_select")
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty")
REPEATS = 5


@dataclass(frozen=True)
class Work:
    """Numbers of floating-point operations and of bytes that are read and written."""

    operations: int
    bytes: int


@dataclass(frozen=True)
class Peaks:
    """What the machine reached: operations of a matrix product per second, and bytes read and written by a copy per
    second.
    """

    operations: float
    bytes: float


class _Tally(TorchDispatchMode):
    """Counts the bytes read and written, and the floating-point operations that PyTorch's counter does not know."""

    bytes, operations = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "sparse_sampled_addmm":  # an inner product per place
            self.operations += 2 * args[0].values().numel() * args[1].shape[1]
        if name == "qconv2d_pointwise":  # of packed weights
            self.operations += 2 * result.numel() * math.prod(args[3].shape[1:])
        inputs = _tensors((args, {name: value for name, value in kwargs.items() if name != "out"}))
        outputs = _tensors(result)
        # ``reshape`` and ``to`` give a view where they can, and a copy where they cannot.
        seen = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        may_be_view = func.is_view or name == "_unsafe_view"
        is_view = may_be_view and all(tensor.untyped_storage().data_ptr() in seen for tensor in outputs)
        if not is_view and name not in ALLOCATIONS:
            if name in GATHERS:
                inputs = [*outputs, *inputs[1:]]
            self.bytes += sum(_stored_bytes(tensor) for tensor in (*inputs, *outputs))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in a value; of sparse matrices, their parts."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [part for tensor in tensors for part in _parts(tensor)]


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout == torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,) if tensor.layout == torch.strided else ()  # weights that oneDNN packed show no storage


def _stored_bytes(tensor: Tensor) -> int:
    """The bytes that a tensor really occupies; an expanded tensor occupies less than its size."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def count(function: Callable[[], Any]) -> tuple[Any, Work]:
    """The return value of a function, and the work that it did."""
    with FlopCounterMode(display=False) as known, _Tally() as tally:
        result = function()
    return result, Work(known.get_total_flops() + tally.operations, tally.bytes)


@torch.inference_mode()
def stage_work(model: DEQFlow, earlier: np.ndarray, later: np.ndarray, iterations: int) -> dict[str, Work]:
    """The work of each stage of a warm field with a number of iterations, and of one iteration; images are (H, W, 3)
    uint8 RGB.
    """
    first = _encode(model, earlier).encoding
    second, encode = count(lambda: _encode(model, later).encoding)
    start = model.initial_state(first)

    def ahead() -> tuple[State, Any]:
        return carry(start), model.prepare(first)

    (state, prepared), prepare = count(ahead)
    features = first.features, second.features
    _, match = count(lambda: likeness(torch.cat((torch.zeros_like(state[1]), state[1])), *features))
    lookups = min(iterations, LOOKUPS)
    problem, correlate = count(lambda: model.problem(first, second, prepared, iterations=lookups))
    solution, iteration = count(lambda: solve(problem, state, max_iterations=1, measure=update_px, check_start=False))
    _, upsample = count(lambda: (model.upsample(solution.state), model.upsample_residual(solution)))
    return dict(zip(STAGES, (encode, prepare, match, correlate, iteration, upsample), strict=True))


def _encode(model: DEQFlow, image: np.ndarray) -> Any:
    (encoded,) = encode_images(model, model.device, [image], [image])
    return encoded


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Time a large matrix product and a large copy, and take the best of several runs. On a GPU, float32 means what
    its convolutions use.
    """
    cuda = device.type == "cuda"
    side, block = (8192, 1 << 30) if cuda else (2048, 1 << 28)
    a, b = torch.rand(2, side, side, device=device).to(dtype)
    source = torch.zeros(block, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        product_s = _best_seconds(lambda: torch.matmul(a, b), device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    copy_s = _best_seconds(lambda: target.copy_(source), device)
    return Peaks(2 * side**3 / product_s, 2 * block / copy_s)


def _best_seconds(function: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def compare(works: Mapping[str, Work], peaks: Peaks, stage_ms: Mapping[str, float], iterations: int) -> dict[str, Any]:
    """Compare each stage of a field with the limits of the machine. The limit of the whole field is the sum of those
    of the stages.
    """
    stages: dict[str, dict[str, Any]] = {}
    for name in STAGES:
        by = {
            "operations": 1e3 * works[name].operations / peaks.operations,
            "bytes": 1e3 * works[name].bytes / peaks.bytes,
        }
        bound = max(by, key=lambda what: by[what])
        stages[name] = {
            "operations": works[name].operations, "bytes": works[name].bytes, "limit_ms": by[bound], "bound": bound,
            "ms": stage_ms["ahead" if name == "prepare" else name],
        }  # fmt: skip
    times = {name: iterations if name == "iteration" else 1 for name in STAGES}
    columns = ("operations", "bytes", "limit_ms", "ms")
    field = {column: sum(times[name] * stages[name][column] for name in STAGES) for column in columns}
    return {
        "peak_operations_per_s": peaks.operations, "peak_bytes_per_s": peaks.bytes,
        "stages": {**stages, "field": {**field, "bound": "-"}},
    }  # fmt: skip


def print_roofline(report: dict[str, Any], ours: str, console: Console) -> None:
    """Print one line per stage."""
    stages = table(
        f"'{ours}' against the machine: {report['peak_operations_per_s'] / 1e9:.0f} GFLOP/s (matrix product), "
        f"{report['peak_bytes_per_s'] / 1e9:.1f} GB/s (copy)",
        ["stage"],
        ["GFLOP", "MB moved", "ms", "GFLOP/s", "GB/s", "limit, ms", "of it", "bound by"],
    )
    for name, stage in report["stages"].items():
        stages.add_row(
            name, f"{stage['operations'] / 1e9:.2f}", f"{stage['bytes'] / 1e6:.1f}", f"{stage['ms']:.2f}",
            f"{stage['operations'] / stage['ms'] / 1e6:.1f}", f"{stage['bytes'] / stage['ms'] / 1e6:.1f}",
            f"{stage['limit_ms']:.2f}", f"{stage['limit_ms'] / stage['ms']:.0%}", stage["bound"],
        )  # fmt: skip
    console.print(stages)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished, so that a clock that is read afterwards includes its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
