# SPDX-License-Identifier: Apache-2.0
"""Weights into another format, without changing a number.

    python -m training.export WEIGHTS --to released --out model.pth
    python -m training.export WEIGHTS --to safetensors --out model.safetensors
    python -m training.export WEIGHTS --to onnx --out FOLDER

``released`` is the key layout of the method's authors, for programs that read it; sizes with two encoders only, so not
``nano``. ``safetensors`` is this project's format. Weight normalisation is kept in both. ``onnx`` is four graphs for
runtimes without PyTorch, which docs/export.md describes: ``encode``, once per image; ``pair``, once per pair; ``step``,
once per iteration; ``upsample``, once per pair. Before they are kept, they are run with onnxruntime and compared with
PyTorch. Needs the packages onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_flatten, tree_unflatten

from deq_flow_ros.command_line import CommandLine, exit_status
from deq_flow_ros.model import FACTOR, DEQFlow, load_model, save_model, update_px
from deq_flow_ros.model.cells import positions
from deq_flow_ros.model.checkpoints import to_released
from deq_flow_ros.model.correlation import CorrelationPyramid, look_up
from training.run import write_checkpoint

GRAPHS = ("encode", "pair", "step", "upsample")
TOLERANCE_PX, CHECKED_ITERATIONS = 1e-3, 6  # how far the flow after so many iterations may be from PyTorch's
CHECKED_SHAPES = ((1, 128, 176), (2, 200, 136))  # (B, H, W) of the images: one wide, one high, in different batches
_EXAMPLE = (2, 13, 17)  # batch and cells that graphs are traced with; a batch of 1 would be taken for a constant


class _Graph(nn.Module):
    """A function of the model's parts as a module, as the exporter asks for."""

    def __init__(self, model: DEQFlow, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model, self.forward = model.eval(), function


def _prepared(model: DEQFlow) -> tuple[list[Any], Any, list[int]]:
    """What the update operator prepares, of any context: its leaves, its structure, and the places of the leaves that
    depend on the context. The others are constants.
    """
    generator = torch.Generator().manual_seed(0)
    contexts = (
        torch.rand(batch, model.architecture.context_dim, *size, generator=generator)
        for batch, size in ((2, (11, 13)), (3, (12, 15)))
    )
    (leaves, structure), (others, _) = (tree_flatten(model.update_block.prepare(context)) for context in contexts)
    pairs = enumerate(zip(leaves, others, strict=True))
    return leaves, structure, [i for i, (a, b) in pairs if isinstance(a, Tensor) and not torch.equal(a, b)]


def export(model: DEQFlow, folder: str | Path) -> None:
    """Write the graphs of a model from ``load_model``, on the CPU, as ``encode.onnx`` and so on, unchecked."""
    a, (leaves, structure, moving) = model.architecture, _prepared(model)

    def encode(image: Tensor) -> tuple[Tensor, ...]:
        encoding = model.encode(image)
        return encoding.features, encoding.context

    def pair(features1: Tensor, features2: Tensor, context1: Tensor) -> tuple[Tensor, ...]:
        pyramid = CorrelationPyramid(features1, features2, a.correlation_levels, a.correlation_radius)
        prepared, _ = tree_flatten(model.update_block.prepare(context1))
        return (*pyramid.volumes, *(prepared[place] for place in moving))

    def step(hidden: Tensor, flow: Tensor, pyramid: tuple[Tensor, ...], rest: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        targets = positions(flow.shape[2], flow.shape[3], flow.device) + flow
        correlation = look_up(pyramid, targets, a.correlation_radius)
        given = dict(zip(moving, rest, strict=True))
        prepared = tree_unflatten([given.get(place, leaf) for place, leaf in enumerate(leaves)], structure)
        after = model.update_block(hidden, flow, correlation, prepared)
        return after[0], after[1], update_px((hidden, flow), after)

    def upsample(hidden: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
        uncertainty = model.upsample_uncertainty((hidden, flow))
        return (model.upsample((hidden, flow)), *(() if uncertainty is None else (uncertainty,)))

    batch, height, width = _EXAMPLE
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(batch, 3, FACTOR * height, FACTOR * width, generator=generator)
    hidden = torch.rand(batch, a.hidden_dim, height, width, generator=generator)
    flow = torch.rand(batch, 2, height, width, generator=generator)
    features, context = encode(image)
    other = features.flip(3)  # one tensor in two places would be taken for one input
    outputs = pair(features, other, context)
    pyramid, rest = outputs[: a.correlation_levels], outputs[a.correlation_levels :]
    passed = [*(f"pyramid_{i}" for i in range(len(pyramid))), *(f"prepared_{i}" for i in range(len(rest)))]
    full = ["full_flow", *(["uncertainty"] if a.uncertainty_dim else [])]
    stepped = ["next_hidden", "next_flow", "update_px"]
    for function, example, inputs, results in (
        (encode, (image,), ["image"], ["features", "context"]),
        (pair, (features, other, context), ["features1", "features2", "context1"], passed),
        (step, (hidden, flow, pyramid, rest), ["hidden", "flow", *passed], stepped),
        (upsample, (hidden, flow), ["hidden", "flow"], full),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about its own insides
            program = torch.onnx.export(
                _Graph(model, function), example, dynamo=True, dynamic_shapes=_free(example), input_names=inputs,
                output_names=results, verbose=False,
            )  # fmt: skip
        assert program is not None  # it is when a file name is given
        program.save(Path(folder) / f"{function.__name__}.onnx", external_data=False)


def _free(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_free(part) for part in value)
    # The channels of a map are fixed by the weights; volumes and attention have none.
    return {dim: Dim.AUTO for dim in range(value.dim()) if dim != 1 or value.dim() != 4}


class OnnxFlow:
    """The exported graphs in a folder, run by onnxruntime with these providers: how to put them together, in numpy.

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
        hidden, flow = (np.zeros((batch, count, height, width), np.float32) for count in (channels, 2))
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

    :raises ValueError: if it does not, within ``TOLERANCE_PX``; the folder is left as it was. Or for a missing package.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that nothing here needs
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as temporary:
        try:
            export(model, temporary)
            difference = largest_difference(model, temporary)
        except ImportError as error:
            raise ValueError(f"{error}; exporting to ONNX needs: pip install onnx onnxscript onnxruntime") from error
        if not difference <= TOLERANCE_PX:
            raise ValueError(
                f"the exported graphs differ from PyTorch by {difference:.2g} px after {CHECKED_ITERATIONS} "
                f"iterations, more than {TOLERANCE_PX:g} px; nothing was written"
            )
        for name in GRAPHS:
            os.replace(Path(temporary) / f"{name}.onnx", folder / f"{name}.onnx")
    print(f"{', '.join(f'{name}.onnx' for name in GRAPHS)} in {folder}: within {difference:.1e} px of PyTorch")
    return difference


# Format: how to write it, and what its name ends with.
FORMATS: dict[str, tuple[Callable[[DEQFlow, Path], Any], tuple[str, ...]]] = {
    "released": (lambda model, path: write_checkpoint(to_released(model), path), (".pth", ".pt")),
    "safetensors": (save_model, (".safetensors",)),
    "onnx": (lambda model, folder: export_checked(model.folded(), folder), ("",)),
}


def main(arguments: list[str] | None = None) -> int:
    """Export; returns the exit status. An ending of ``--out`` that belongs to another format is refused."""
    line = CommandLine("python -m training.export", __doc__)
    line.add_argument("weights", help="a model that ships, a .safetensors file, or a released checkpoint")
    line.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    line.add_path("--out", "file to write (onnx: folder); replaced if there", required=True)
    options = line.parse_args(arguments)
    write, endings = FORMATS[options.to]
    if options.out.suffix not in endings:
        expected = f"end in {' or '.join(endings)}" if any(endings) else "be a folder"
        line.error(f"--out for --to {options.to} must {expected}, got {options.out}")

    def work() -> int:
        model = load_model(options.weights, fold=False)
        write(model, options.out)
        print(f"{options.out}: {model.architecture}")
        return 0

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main())
