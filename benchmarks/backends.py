# SPDX-License-Identifier: Apache-2.0
"""Would another runtime be faster? The stages of one field by PyTorch as it is used here, ``torch.compile``, ONNX
Runtime and OpenVINO, on a CPU, in one run.

``python -m benchmarks.backends --threads 1 [--height H --width W] [--iterations N] [--json OUT]``

ONNX Runtime and OpenVINO run the exported graphs (training/export_onnx.py), which hold the correlation of all pairs; a
runtime that is not installed is left out, by name. Runtimes take turns, stage by stage. *field* is encode, pair, N
times step, upsample. What a stage takes does not depend on the pictures, so they are noise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.report import Benchmark, Row, median, table
from deq_flow_ros.host import keep_freed_memory
from deq_flow_ros.model import FACTOR, DEQFlow, load_model
from deq_flow_ros.model.precision import INT8
from training.export_onnx import GRAPHS, OnnxFlow, export

Stages = Mapping[str, Callable[[], Any]]
"""What computes each stage; the keys are those of ``GRAPHS``."""
Run = Callable[..., dict[str, np.ndarray]]
"""Takes the name of a graph, and its inputs by keyword; returns its outputs by name."""
ROUNDS = 9


def pytorch(model: DEQFlow, image: np.ndarray, iterations: int, compiled: bool = False) -> Stages:
    """The calls of the model itself, or compiled ones, with all-pairs or on-demand correlation as that many lookups
    need it.
    """
    first = torch.from_numpy(image).to(torch.uint8)
    second = first.roll(2, 3)
    wrap: Callable[..., Any] = torch.compile(dynamic=False) if compiled else lambda function: function
    encode, update, upsample = wrap(model.encode), wrap(model.update_block), wrap(model.upsample)
    encoding1, encoding2 = model.encode(first), model.encode(second)
    prepared = model.prepare(encoding1)
    problem = model.problem(encoding1, encoding2, prepared, iterations=iterations)
    hidden, flow = problem(*model.initial_state(encoding1))

    def step() -> Any:
        return update(hidden, flow, problem.correlation.lookup(flow).to(hidden.dtype), prepared)

    def pair() -> Any:
        return model.problem(encoding1, encoding2, model.prepare(encoding1), iterations=iterations)

    return {"encode": lambda: encode(first), "pair": pair, "step": step, "upsample": lambda: upsample((hidden, flow))}


def graphs(run: Run, model: DEQFlow, image: np.ndarray) -> Stages:
    """The stages as exported graphs that another runtime executes."""
    first, second = run("encode", image=image), run("encode", image=np.roll(image, 2, 3))
    features = {"features1": first["features"], "features2": second["features"], "context1": first["context"]}
    pair = run("pair", **features)
    size = image.shape[2] // FACTOR, image.shape[3] // FACTOR
    hidden = np.zeros((1, model.architecture.hidden_dim, *size), np.float32)
    flow = np.zeros((1, 2, *size), np.float32)
    return {
        "encode": lambda: run("encode", image=image),
        "pair": lambda: run("pair", **features),
        "step": lambda: run("step", hidden=hidden, flow=flow, **pair),
        "upsample": lambda: run("upsample", hidden=hidden, flow=flow),
    }


def openvino(folder: str, precision: str) -> Run:
    """A runner of OpenVINO for ``graphs``."""
    import openvino  # type: ignore[import-not-found]

    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    models = {name: openvino.Core().compile_model(f"{folder}/{name}.onnx", "CPU", hints) for name in GRAPHS}

    def run(name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {output.any_name: value for output, value in models[name](inputs).items()}

    return run


def backends(model: str, image: np.ndarray, iterations: int, console: Console) -> dict[str, Stages]:
    """Every runtime that is installed, by name."""
    float32, half = load_model(model), load_model(model, precision="bfloat16")
    found = {}
    for precision, network in (("float32", float32), ("bfloat16", half)):
        found[f"PyTorch, {precision}"] = pytorch(network, image, iterations)
        found[f"torch.compile, {precision}"] = pytorch(network, image, iterations, compiled=True)
    try:
        found["PyTorch, int8"] = pytorch(load_model(model, precision=INT8), image, iterations)
    except ValueError as error:
        console.print(f"PyTorch, int8 is left out: {error}", markup=False)
    with tempfile.TemporaryDirectory() as folder:
        export(float32, folder)
        makers: dict[str, Callable[[], Run]] = {
            "ONNX Runtime, float32": lambda: OnnxFlow(folder).run,
            "OpenVINO, float32": partial(openvino, folder, "f32"),
            "OpenVINO, bfloat16": partial(openvino, folder, "bf16"),
        }
        for name, make in makers.items():
            package = name.split(",")[0].replace(" ", "").lower()
            if find_spec(package) is None:
                console.print(f"{name} is left out: there is no package {package}", markup=False)
            else:
                found[name] = graphs(make(), float32, image)
    return found


def measure(stages: Mapping[str, Stages], iterations: int) -> dict[str, dict[str, float]]:
    """The median time in ms of each stage and of a whole field, by runtime; "start_s" is the time of the first calls
    in s.
    """
    starts: dict[str, float] = {}
    for name, functions in stages.items():
        began = time.perf_counter()
        for function in functions.values():
            function()
        starts[name] = time.perf_counter() - began
    times: dict[str, dict[str, list[float]]] = {name: {stage: [] for stage in GRAPHS} for name in stages}
    for _ in range(ROUNDS):
        for stage in GRAPHS:
            for name, functions in stages.items():
                functions[stage]()  # the runtime before has used the caches
                began = time.perf_counter()
                functions[stage]()
                times[name][stage].append(1e3 * (time.perf_counter() - began))
    rows: dict[str, dict[str, float]] = {}
    for name, by_stage in times.items():
        row = {stage: median(values) for stage, values in by_stage.items()}
        row["field"] = sum((iterations if stage == "step" else 1) * ms for stage, ms in row.items())
        rows[name] = {**row, "start_s": starts[name]}
    return rows


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure every runtime that is installed, and print the table."""
    keep_freed_memory()  # as the node does
    image = 255 * np.random.default_rng(0).random((1, 3, options.height, options.width), np.float32)
    with torch.inference_mode():
        rows = measure(backends(options.model, image, options.iterations, console), options.iterations)
    runtimes = table(
        f"{options.width}x{options.height}, {options.threads} thread(s), median ms",
        ["runtime"],
        [*GRAPHS, f"field of {options.iterations}", "of PyTorch's", "first calls, s"],
    )
    for name, row in rows.items():
        ratio = row["field"] / rows[f"PyTorch, {name.rsplit(', ')[-1]}"]["field"]
        cells = [f"{row[stage]:.1f}" for stage in (*GRAPHS, "field")]
        runtimes.add_row(name, *cells, f"{ratio:.2f}x", f"{row['start_s']:.1f}")
    console.print(runtimes)
    return {"iterations": options.iterations, "runtimes": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False, threads=1)
    line.add_model()
    line.add_size(480, 640, "of the image", multiple=FACTOR)
    line.add_number("--iterations", 2, "of a field", least=1)
    return line.run(line.parse_args(arguments), run)


if __name__ == "__main__":
    raise SystemExit(main())
