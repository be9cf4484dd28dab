# SPDX-License-Identifier: Apache-2.0
"""Which engine a device gets, and what is said where it is not the fastest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fake_graphs import FakeDevice
from streams import PERIOD_NS, frames

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import FlowEstimator, choose_runtime, estimator
from deq_flow_ros.streaming.graph_engine import GraphEngine


def test_the_fastest_runtime_that_an_installation_has_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: no Triton or no compiler is a message, not a failure; and no message would be a slow robot without a why."""
    assert choose_runtime("auto", "cpu") == choose_runtime("eager", "cpu") == ("eager", "")
    monkeypatch.setattr(estimator, "find_spec", lambda name: object())
    monkeypatch.setattr(estimator.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert choose_runtime("auto", "cuda:0") == ("compiled", "")
    assert choose_runtime("graphs", "cuda") == ("graphs", "")
    monkeypatch.setattr(estimator.shutil, "which", lambda name: None)
    name, why = choose_runtime("auto", "cuda")
    assert name == "graphs" and why.startswith("not compiled: no C compiler")
    monkeypatch.setattr(estimator, "find_spec", lambda name: None)
    name, why = choose_runtime("compiled", "cuda")
    assert name == "graphs" and why.startswith("not compiled: Triton is not installed")


def test_a_runtime_that_a_device_cannot_have_is_an_error() -> None:
    """Why: whoever asks for graphs must not get slow calls in silence."""
    with pytest.raises(ValueError, match="the runtime graphs needs a CUDA device, got 'cpu'; expected auto or eager"):
        FlowEstimator(DEQFlow("nano"), runtime="graphs")
    with pytest.raises(ValueError, match="expected a runtime out of auto, eager, graphs, compiled, got 'tensorrt'"):
        choose_runtime("tensorrt", "cuda")


def test_compiled_code_is_kept_apart_by_version_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: the second start must not compile again, and code for another card or version must not be taken."""
    monkeypatch.delenv(estimator.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = estimator.keep_compiled_code(torch.device("cpu"))
    assert place is not None and place.is_dir() and tmp_path in place.parents
    assert torch.__version__ in place.name and place.name.endswith("cpu")
    assert os.environ[estimator.CACHE] == str(place)
    monkeypatch.setenv(estimator.CACHE, "/elsewhere")
    assert estimator.keep_compiled_code(torch.device("cpu")) == Path("/elsewhere")
    monkeypatch.delenv(estimator.CACHE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert estimator.keep_compiled_code(torch.device("cpu")) is None


def test_what_does_not_compile_is_captured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a compiler may fail on one card or version; graphs of single operations are still there."""
    monkeypatch.setattr(torch, "compile", lambda part, **_: lambda *_: (_ for _ in ()).throw(RuntimeError("no ptxas")))
    device = FakeDevice()
    engine = GraphEngine(DEQFlow("nano").eval(), device.clock, device, compiled=True, behind=False)
    flow = FlowEstimator(engine, max_iterations=1)
    for i, image in enumerate(frames(4)):
        result = flow.update(image, i * PERIOD_NS)
    assert result is not None and result.info.runtime == "graphs"
    assert engine.about == "graphs of 1 size(s); not compiled: RuntimeError: no ptxas"
