# SPDX-License-Identifier: Apache-2.0
"""Write the flow of a benchmark's test split as its server expects it.

``python -m training.submit --data sintel=FOLDER --out DIR [--model NAME_OR_PATH] [--iterations N] [--warm]``

NAME is ``sintel`` (both passes), ``kitti-2012``, ``kitti-2015`` or ``spring`` (both cameras, both directions). Where
the server takes a zip file, it is written as well. DIR must be new or empty, so that no other submission gets
among them.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from deq_flow_ros.command_line import CommandLine, exit_status, named_path, set_threads
from deq_flow_ros.model import load_model
from deq_flow_ros.recordings.flow_files import write_flow
from training.datasets import open_dataset
from training.evaluate import add_solve, solved

KITTI_RANGE_PX = (-512.0, 512.0 - 1 / 64)  # what the 16 bits of its format hold


class Server(NamedTuple):
    """How a benchmark's server wants the results."""

    parts: Mapping[str, str]  # data set to the folder of its files; a file below it is named like the sample
    suffix: str
    pairs: int  # in the whole test split; a submission of fewer is refused there
    afterwards: str  # what is left to do
    options: Mapping[str, str] = {}  # of the data sets


UPLOAD = "upload the zip file"
SERVERS = {
    "sintel": Server(
        {"sintel-clean": "clean", "sintel-final": "final"}, ".flo", 2 * 552,
        "pack the folders clean and final with the bundler that comes with the data set, and upload what it writes",
    ),
    "kitti-2012": Server({"kitti-2012": "."}, ".png", 195, UPLOAD),
    "kitti-2015": Server({"kitti-2015": "flow"}, ".png", 200, UPLOAD),
    "spring": Server(
        {"spring": "."}, ".flo5", 3960,
        "run the benchmark's flow_subsampling on the folder, and upload what it writes",
        {"side": "both", "direction": "both"},
    ),
}  # fmt: skip
"""Sources: the README of MPI-Sintel; the readme files of the KITTI development kits (2012: files in the root of the
archive, 2015: in its folder ``flow``); the Spring benchmark's instructions."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    line = CommandLine("python -m training.submit", __doc__)
    line.add_argument("--data", type=named_path, required=True, metavar="NAME=ROOT", help=f"NAME: {', '.join(SERVERS)}")
    line.add_path("--out", "folder to write to; new or empty", required=True, metavar="DIR")
    line.add_number("--iterations", 24, "per pair", least=1)
    add_solve(line)
    options = line.parse_args(arguments)
    if options.data[0] not in SERVERS:
        line.error(f"--data: expected one of {', '.join(SERVERS)} as NAME, got {options.data[0]!r}")
    return options


def write_cut(path: Path, flow: np.ndarray) -> int:
    """Write a flow (H, W, 2) px, which must be finite; returns how many pixels were cut to KITTI's range."""
    if not np.isfinite(flow).all():
        raise FloatingPointError(f"the flow for {path} is not finite everywhere; nothing was written")
    within = np.clip(flow, *KITTI_RANGE_PX) if path.suffix == ".png" else flow
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flow(path, within)
    return int((within != flow).any(axis=2).sum())


def submit(options: argparse.Namespace) -> int:
    """Write a submission, and say what is left to do; returns the exit status."""
    set_threads(options.threads)
    name, root = options.data
    server = SERVERS[name]
    if options.out.exists() and any(options.out.iterdir()):
        raise FileExistsError(f"{options.out} is not empty; give a new folder, so that nothing old is submitted")
    datasets = {part: open_dataset(part, root, split="test", **server.options) for part in server.parts}
    model = load_model(options.model, options.device)
    written = cut = 0
    for part, dataset in datasets.items():
        pairs = solved(model, dataset, [options.iterations], options.coarse_levels, options.warm)
        for sample, (flow,) in tqdm(pairs, total=len(dataset), desc=part, unit="pair", dynamic_ncols=True):
            file = sample.name.removeprefix(f"{part}/") + server.suffix
            cut += write_cut(options.out / server.parts[part] / file, flow)
            written += 1
    if server.afterwards == UPLOAD:
        with zipfile.ZipFile(options.out / f"{name}.zip", "w") as archive:  # stored: PNG is compressed already
            for path in sorted(options.out.rglob(f"*{server.suffix}")):
                archive.write(path, path.relative_to(options.out))
    print(f"wrote {written} flow fields in {options.out}; {server.afterwards}")
    if cut:
        print(f"{cut} pixels move by more than 512 px, which the format cannot hold, and were cut to that")
    if written != server.pairs:
        print(f"attention: {name} has {server.pairs} test pairs, {root} has {written}; the server will refuse this")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Write a submission; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: submit(options))


if __name__ == "__main__":
    raise SystemExit(main())
