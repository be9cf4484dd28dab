# SPDX-License-Identifier: Apache-2.0
"""Weights as four ONNX graphs, for runtimes without PyTorch: ``python -m training.export WEIGHTS --to onnx``.

A solve is a loop over one of them, so that the runtime decides how many iterations it makes:

- ``encode``: image -> features, context. Once per frame.
- ``pair``: features1, features2, context1 -> pyramid_0, ..., prepared_0, ... Once per pair: the correlation volumes,
  and what the update operator makes of the context.
- ``step``: hidden, flow, pyramid_*, prepared_* -> next_hidden, next_flow, update_px. Once per iteration.
- ``upsample``: hidden, flow -> full_flow, and uncertainty if the weights have a head for it. Once per pair.

Batch, height and width are free; shapes and units: docs/export.md. Before anything is kept, the graphs are run with
onnxruntime and compared with PyTorch. Needs the packages onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_flatten, tree_unflatten

from deq_flow_ros.model import FACTOR, DEQFlow, update_px
from deq_flow_ros.model.correlation import CorrelationPyramid

GRAPHS = ("encode", "pair", "step", "upsample")
TOLERANCE_PX = 1e-3
"""How far the flow after ``CHECKED_ITERATIONS`` may be from PyTorch's, in px."""
CHECKED_ITERATIONS = 6
CHECKED_SHAPES = ((1, 128, 176), (2, 200, 136))
"""(B, H, W) of the images compared: one wide, one high, with different batch sizes."""
_EXAMPLE = (2, 13, 17)  # batch and cells that graphs are traced with; a batch of 1 would be taken for a constant


class _Encode(nn.Module):
    def __init__(self, model: DEQFlow) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        encoding = self.model.encode(image)
        return encoding.features, encoding.context


class _Prepared:
    """What the update operator prepares, as tensors to pass on and constants to keep in the graph of the step.

    What an operator prepares is its own affair: any structure, part of it weights. What is the same for two different
    contexts is a constant.
    """

    def __init__(self, model: DEQFlow) -> None:
        context_dim, generator = model.architecture.context_dim, torch.Generator().manual_seed(0)
        (self._template, self._structure), (other, _) = (
            tree_flatten(model.update_block.prepare(torch.rand(batch, context_dim, *size, generator=generator)))
            for batch, size in ((2, (11, 13)), (3, (12, 15)))
        )
        self._moving = [
            place
            for place, (a, b) in enumerate(zip(self._template, other, strict=True))
            if isinstance(a, Tensor) and not (a.shape == b.shape and torch.equal(a, b))
        ]

    def tensors(self, prepared: Any) -> tuple[Tensor, ...]:
        """Those that depend on the context."""
        leaves, _ = tree_flatten(prepared)
        return tuple(leaves[place] for place in self._moving)

    def assemble(self, tensors: Sequence[Tensor]) -> Any:
        """The inverse of ``tensors``."""
        leaves = list(self._template)
        for place, tensor in zip(self._moving, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self._structure)


class _Pair(nn.Module):
    def __init__(self, model: DEQFlow, prepared: _Prepared) -> None:
        super().__init__()
        self.model, self.prepared = model, prepared

    def forward(self, features1: Tensor, features2: Tensor, context1: Tensor) -> tuple[Tensor, ...]:
        a = self.model.architecture
        pyramid = CorrelationPyramid(features1, features2, a.correlation_levels, a.correlation_radius)
        return (*pyramid.volumes(), *self.prepared.tensors(self.model.update_block.prepare(context1)))


class _Step(nn.Module):
    def __init__(self, model: DEQFlow, prepared: _Prepared) -> None:
        super().__init__()
        self.model, self.prepared = model, prepared

    def forward(
        self, hidden: Tensor, flow: Tensor, pyramid: tuple[Tensor, ...], prepared: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        radius = self.model.architecture.correlation_radius
        correlation = CorrelationPyramid.from_volumes(pyramid, radius).lookup(flow)
        after = self.model.update_block(hidden, flow, correlation, self.prepared.assemble(prepared))
        return after[0], after[1], update_px((hidden, flow), after)


class _Upsample(nn.Module):
    def __init__(self, model: DEQFlow) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
        uncertainty = self.model.upsample_uncertainty((hidden, flow))
        return (self.model.upsample((hidden, flow)), *(() if uncertainty is None else (uncertainty,)))


def export(model: DEQFlow, folder: str | Path) -> None:
    """Write the graphs of a model on the CPU as ``encode.onnx`` and so on, unchecked.

    :param model: from ``load_model``: weight normalisation folded, no gradients.
    """
    folder, a = Path(folder), model.architecture
    batch, height, width = _EXAMPLE
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(batch, 3, FACTOR * height, FACTOR * width, generator=generator)
    hidden = torch.rand(batch, a.hidden_dim, height, width, generator=generator)
    flow = torch.rand(batch, 2, height, width, generator=generator)
    prepared = _Prepared(model)
    features, context = _Encode(model)(image)
    other = features.flip(3)  # one tensor in two places would be taken for one input
    outputs = _Pair(model, prepared)(features, other, context)
    pyramid, rest = outputs[: a.correlation_levels], outputs[a.correlation_levels :]
    passed = [*(f"pyramid_{i}" for i in range(len(pyramid))), *(f"prepared_{i}" for i in range(len(rest)))]
    _write(folder / "encode.onnx", _Encode(model), (image,), ["image"], ["features", "context"])
    _write(
        folder / "pair.onnx", _Pair(model, prepared), (features, other, context),
        ["features1", "features2", "context1"], passed,
    )  # fmt: skip
    _write(
        folder / "step.onnx", _Step(model, prepared), (hidden, flow, pyramid, rest),
        ["hidden", "flow", *passed], ["next_hidden", "next_flow", "update_px"],
    )  # fmt: skip
    full = ["full_flow", *(["uncertainty"] if a.uncertainty_dim else [])]
    _write(folder / "upsample.onnx", _Upsample(model), (hidden, flow), ["hidden", "flow"], full)


def _write(path: Path, module: nn.Module, example: tuple[Any, ...], inputs: list[str], outputs: list[str]) -> None:
    def free(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(free(part) for part in value)
        # The channels of a map are fixed by the weights; volumes and attention have none.
        return {dim: Dim.AUTO for dim in range(value.dim()) if dim != 1 or value.dim() != 4}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own insides
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, dynamic_shapes=free(example), input_names=inputs,
            output_names=outputs, verbose=False,
        )  # fmt: skip
    assert program is not None  # it is when a file name is given
    program.save(path, external_data=False)


class OnnxFlow:
    """The exported graphs, run by onnxruntime: how to put them together, in numpy.

    :param folder: of the four graphs.
    :param providers: of onnxruntime, in the order of preference; the default runs anywhere.
    :raises FileNotFoundError: naming the graph that is missing.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._sessions = {}
        for name in GRAPHS:
            path = Path(folder) / f"{name}.onnx"
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; expected {', '.join(GRAPHS)} beside each other")
            self._sessions[name] = onnxruntime.InferenceSession(path, options, providers=list(providers))

    def run(self, name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """One graph: its outputs, by name."""
        session = self._sessions[name]
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, inputs), strict=True))

    def __call__(self, image1: np.ndarray, image2: np.ndarray, iterations: int = 12) -> np.ndarray:
        """Flow (B, 2, H, W) px from image 1 to image 2, started cold.

        :param image1: (B, 3, H, W) float32 RGB 0..255; H and W multiples of 8, at least 64.
        """
        first, second = self.run("encode", image=image1), self.run("encode", image=image2)
        pair = self.run("pair", features1=first["features"], features2=second["features"], context1=first["context"])
        channels = self._sessions["step"].get_inputs()[0].shape[1]
        batch, _, height, width = first["context"].shape
        hidden, flow = (
            np.zeros((batch, channels, height, width), np.float32),
            np.zeros((batch, 2, height, width), np.float32),
        )
        for _ in range(iterations):
            result = self.run("step", hidden=hidden, flow=flow, **pair)
            hidden, flow = result["next_hidden"], result["next_flow"]
        return self.run("upsample", hidden=hidden, flow=flow)["full_flow"]


def largest_difference(model: DEQFlow, folder: str | Path) -> float:
    """Largest difference in px between the graphs' flow and the model's, over ``CHECKED_SHAPES``."""
    graphs, generator, worst = OnnxFlow(folder), torch.Generator().manual_seed(0), 0.0
    for batch, height, width in CHECKED_SHAPES:
        coarse = 255 * torch.rand(batch, 3, height // 4, width // 4, generator=generator)
        image1 = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        image2 = image1.roll((2, 5), (2, 3))
        expected = model(image1, image2, max_iterations=CHECKED_ITERATIONS).flow
        flow = graphs(image1.numpy(), image2.numpy(), CHECKED_ITERATIONS)
        worst = max(worst, float(np.abs(flow - expected.numpy()).max()))
    return worst


def export_checked(model: DEQFlow, folder: str | Path) -> float:
    """``export``, kept only if onnxruntime gives what PyTorch gives; returns the largest difference in px.

    :raises ValueError: if it does not, within ``TOLERANCE_PX``; the folder is left as it was.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that nothing here needs
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as temporary:
        export(model, temporary)
        difference = largest_difference(model, temporary)
        if not difference <= TOLERANCE_PX:
            raise ValueError(
                f"the exported graphs differ from PyTorch by {difference:.2g} px after {CHECKED_ITERATIONS} "
                f"iterations, more than {TOLERANCE_PX:g} px; nothing was written"
            )
        for name in GRAPHS:
            os.replace(Path(temporary) / f"{name}.onnx", folder / f"{name}.onnx")
    return difference
