# SPDX-License-Identifier: Apache-2.0
"""Weights into another format, without changing a number.

    python -m training.export WEIGHTS --to released --out model.pth
    python -m training.export WEIGHTS --to safetensors --out model.safetensors
    python -m training.export WEIGHTS --to onnx --out FOLDER

``released`` is the key layout of the method's authors, for programs that read it; sizes with two encoders only, so not
``nano``. ``safetensors`` is this project's format. Weight normalisation is kept in both. ``onnx`` is four graphs for
runtimes without PyTorch, see training/export_onnx.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from deq_flow_ros.command_line import CommandLine, exit_status
from deq_flow_ros.model import DEQFlow, load_model, save_model
from deq_flow_ros.model.released import to_released
from training.export_onnx import GRAPHS, export_checked
from training.run import write_checkpoint


def _write_released(model: DEQFlow, path: Path) -> None:
    write_checkpoint(to_released(model), path)


def _write_onnx(model: DEQFlow, path: Path) -> None:
    try:
        difference = export_checked(model.folded(), path)
    except ImportError as error:
        raise ValueError(f"{error}; exporting to ONNX needs: pip install onnx onnxscript onnxruntime") from error
    print(f"{', '.join(f'{name}.onnx' for name in GRAPHS)} in {path}: within {difference:.1e} px of PyTorch")


# Format: how to write it, and what its name ends with.
FORMATS: dict[str, tuple[Callable[[DEQFlow, Path], None], tuple[str, ...]]] = {
    "released": (_write_released, (".pth", ".pt")),
    "safetensors": (save_model, (".safetensors",)),
    "onnx": (_write_onnx, ("",)),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; an ending of ``--out`` that belongs to another format is refused."""
    line = CommandLine("python -m training.export", __doc__)
    line.add_argument("weights", help="a model that ships, a .safetensors file, or a released checkpoint")
    line.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    line.add_path("--out", "file to write (onnx: folder); replaced if there", required=True)
    options = line.parse_args(arguments)
    endings = FORMATS[options.to][1]
    if options.out.suffix not in endings:
        expected = f"end in {' or '.join(endings)}" if any(endings) else "be a folder"
        line.error(f"--out for --to {options.to} must {expected}, got {options.out}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Export; returns the exit status."""
    options = parse_arguments(arguments)

    def work() -> int:
        model = load_model(options.weights, fold=False)
        FORMATS[options.to][0](model, options.out)
        a = model.architecture
        print(
            f"{options.out}: {a.encoder} encoder, hidden state {a.hidden_dim}, update operator {a.update}, "
            f"{'with' if a.weight_norm else 'without'} weight normalisation"
        )
        return 0

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main())
