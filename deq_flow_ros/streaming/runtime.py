# SPDX-License-Identifier: Apache-2.0
"""What computes: which engine a device gets, by name, and where compiled code is kept."""

from __future__ import annotations

import logging
import os
import re
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming.clock import MACHINE, Clock
from deq_flow_ros.streaming.eager import EagerEngine
from deq_flow_ros.streaming.graphs import GraphEngine

RUNTIMES = ("auto", "eager", "graphs", "compiled")
CACHE = "TORCHINDUCTOR_CACHE_DIR"
COMPILERS = ("gcc", "cc", "clang")

LOG = logging.getLogger(__name__)
# Estimators of one model, clock and runtime have one engine, so that their frames can be a batch of it.
_engines: WeakValueDictionary[tuple[int, int, str], EagerEngine] = WeakValueDictionary()


def choose_runtime(runtime: str, device: str | torch.device) -> tuple[str, str]:
    """The name of a runtime, out of ``RUNTIMES`` without "auto": the one asked for, or the fastest that there is.

    "eager" calls PyTorch's operations one by one, "graphs" replays captured CUDA graphs of them, and "compiled" graphs
    of compiled parts.

    :returns: and why it is not a faster one, if this installation is the reason; else "".
    :raises ValueError: for a name that is none, or one that the device cannot have.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"expected a runtime out of {', '.join(RUNTIMES)}, got {runtime!r}")
    if torch.device(device).type != "cuda":
        if runtime not in ("auto", "eager"):
            raise ValueError(f"the runtime {runtime} needs a CUDA device, got {str(device)!r}; expected auto or eager")
        return "eager", ""
    missing = why_not_compiled()
    if runtime == "auto":
        return ("compiled", "") if not missing else ("graphs", f"not compiled: {missing}")
    if runtime == "compiled" and missing:
        return "graphs", f"not compiled: {missing}"
    return runtime, ""


def why_not_compiled() -> str:
    """What of PyTorch's compiler for GPUs is missing here; "" if it is all there."""
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA builds for Linux on x86-64 and Arm (pip: triton)"
    if not hasattr(torch.compiler, "is_compiling"):
        return f"PyTorch {torch.__version__} is too old for it"
    compiler = os.environ.get("CC", "").split()
    if not any(shutil.which(name) for name in (*compiler[:1], *COMPILERS)):
        return f"no C compiler, which Triton needs for its launchers; install one of {', '.join(COMPILERS)}, or set CC"
    return ""


def keep_compiled_code(device: torch.device) -> Path | None:
    """Let PyTorch keep compiled code for the next start, apart for each version and card; where it does.

    In ``$TORCHINDUCTOR_CACHE_DIR`` if that is set, else in ``$XDG_CACHE_HOME/deq_flow_ros`` or
    ``~/.cache/deq_flow_ros``; None where that cannot be written to, and PyTorch takes a folder for temporary files.
    """
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = re.sub(r"[^\w.+-]+", "_", f"{_version()}_torch-{torch.__version__}_{card}")
    place = root / "deq_flow_ros" / "compiled" / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        writable = os.access(place, os.W_OK)
    except OSError as error:
        LOG.warning("compiled code is not kept: %s", error)
        return None
    if not writable:
        return None
    os.environ[CACHE] = str(place)
    return place


def engine_of(model: DEQFlow, clock: Clock = MACHINE, runtime: str = "auto") -> EagerEngine:
    """The engine that all streams of a model share; it lives as long as somebody has it.

    :raises ValueError: as ``choose_runtime``.
    """
    name, reason = choose_runtime(runtime, model.device)
    engine = _engines.get((id(model), id(clock), name))
    if engine is None:
        if reason:
            LOG.warning("%s", reason)
        if name == "eager":
            engine = EagerEngine(model, clock)
        else:
            if name == "compiled":
                keep_compiled_code(model.device)
            engine = GraphEngine(model, clock, compiled=name == "compiled", note=reason)
        _engines[id(model), id(clock), name] = engine
    return engine


def _version() -> str:
    try:
        return metadata.version("deq_flow_ros")
    except metadata.PackageNotFoundError:  # used from its source tree
        return "source"
