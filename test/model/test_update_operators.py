# SPDX-License-Identifier: Apache-2.0
"""The update operators, one of one's own among them, weight normalisation, and the sizes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from deq_flow_ros.equilibrium import phantom_gradient
from deq_flow_ros.model import (
    SIZES,
    UPDATE_OPERATORS,
    Architecture,
    DEQFlow,
    WeightsError,
    load_model,
    register_update_operator,
    save_model,
)
from deq_flow_ros.model.update import Attention
from deq_flow_ros.streaming import FlowEstimator

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
IMAGE = 255 * torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    before = dict(UPDATE_OPERATORS)
    yield
    UPDATE_OPERATORS.clear()
    UPDATE_OPERATORS.update(before)


def parameters(architecture: Architecture) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DEQFlow(architecture).parameters())


def make_table() -> list[str]:
    """The rows of the table of sizes in docs/models.md, without its last column, the weights that ship."""
    rows = []
    for name, a in SIZES.items():
        raft, gma = (f"{parameters(replace(a, update=update)) / 1e6:.2f} M" for update in ("raft", "gma"))
        rows.append(f"| `{name}` | {a.hidden_dim} | {a.feature_dim} | {raft} | {gma} |")
    return rows


def gradient_step(model: DEQFlow) -> None:
    """One step of SGD on the flow of two images, as training takes it."""
    model.train().requires_grad_(True)
    encoding1, encoding2 = model.encode(IMAGE), model.encode(IMAGE.roll(2, -1))
    problem = model.problem(encoding1, encoding2)
    state = phantom_gradient(problem, model.initial_state(encoding1))
    model.upsample(state).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    torch.optim.SGD(model.parameters(), 1e-3).step()


def is_batch_norm(key: str) -> bool:
    """Whether a tensor of the released layout belongs to one; its other encoder has norms without tensors."""
    return ".norm" in key or ".downsample.1." in key


def test_parameters_are_those_of_the_paper_and_of_the_documentation() -> None:
    """Why: the sizes without reference outputs have only their number of parameters to be checked by."""
    assert parameters(replace(SIZES["huge"], flow_head_dim=256)) == pytest.approx(12.8e6, abs=0.05e6)
    page = PAGE.read_text()
    assert [row for row in make_table() if row not in page] == []
    for name in ("nano", "base"):
        count = parameters(load_model(name, fold=False).architecture)
        assert f"{count / 1e6:.2f} M (`{name}`)" in " ".join(page.split())  # with the head for the uncertainty


@pytest.mark.parametrize(("size", "update"), [("nano", "raft"), ("tiny", "gma")])
def test_normalisation_by_constants_folds_away(size: str, update: str, tmp_path: Path) -> None:
    """Why: what is trained with weight norm and batch norm must be the same function without, in files and copies."""
    torch.manual_seed(0)
    model = DEQFlow(replace(SIZES[size], update=update, weight_norm=True))
    gradient_step(model)
    average = copy.deepcopy(model)
    save_model(model, tmp_path / "model.safetensors")
    kept, folded = (load_model(tmp_path / "model.safetensors", fold=fold) for fold in (False, True))
    assert kept.architecture == model.architecture and not folded.architecture.weight_norm
    bare = DEQFlow(replace(SIZES[size], update=update)).state_dict().keys()
    assert folded.state_dict().keys() == (bare if size == "nano" else {key for key in bare if not is_batch_norm(key)})
    assert not any(isinstance(m, nn.BatchNorm2d) or is_parametrized(m) for m in folded.modules())
    assert folded.folded() is folded
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    expected = model.eval()(IMAGE, IMAGE.roll(2, -1), max_iterations=4).flow
    assert torch.equal(kept(IMAGE, IMAGE.roll(2, -1), max_iterations=4).flow, expected)
    for other in (folded, average.eval().folded()):
        flow = other(IMAGE, IMAGE.roll(2, -1), max_iterations=4).flow
        torch.testing.assert_close(flow, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(average(IMAGE, IMAGE.roll(2, -1), max_iterations=4).flow, expected)
    if size == "tiny":
        with pytest.raises(ValueError, match="fold=False"):
            save_model(folded, tmp_path / "folded.safetensors")


def test_weight_norm_is_on_every_iterated_convolution() -> None:
    """Why: one convolution left out would not be the released layout; the attention is outside the iteration."""
    model = DEQFlow(replace(SIZES["tiny"], update="gma", weight_norm=True))
    block = model.get_submodule("update_block")
    convolutions = [name for name, module in block.named_modules() if isinstance(module, nn.Conv2d)]
    plain = [name for name in convolutions if not hasattr(block.get_submodule(name), "parametrizations")]
    assert len(convolutions) == 15 and plain == ["attention.to_qk"]


def test_attention_is_computed_once_per_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: it is the dearest part of the operator and does not change in an iteration."""
    model, made = DEQFlow(replace(SIZES["nano"], update="gma")).eval(), []
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda *a: made.append(forward(*a)) or made[-1])
    model(IMAGE, IMAGE, max_iterations=5)
    assert len(made) == 1 and made[0].shape == (1, 48, 48)
    torch.testing.assert_close(made[0].sum(2), torch.ones(1, 48))


def test_the_operator_of_the_documentation_works(tmp_path: Path) -> None:
    """Why: a third operator must need none of our code changed, and the page that says how must be right."""
    example = next(code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "@register" in code)
    exec(compile(example, str(PAGE), "exec"), {"__name__": "example"})
    torch.manual_seed(0)
    model = DEQFlow(replace(SIZES["nano"], update="convnext", weight_norm=True))
    gradient_step(model)
    assert model.eval()(IMAGE, IMAGE.roll(2, -1), max_iterations=4, solver="anderson").flow.isfinite().all()
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", fold=False)
    assert loaded.architecture.update == "convnext"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    estimator = FlowEstimator(load_model(tmp_path / "model.safetensors"))
    frame = IMAGE[0].permute(1, 2, 0).byte().numpy()
    assert estimator.update(frame, 0) is None
    estimator.prepare()
    result = estimator.update(frame, 33_000_000)
    assert result is not None and result.info.iterations > 0
    del UPDATE_OPERATORS["convnext"]
    with pytest.raises(WeightsError, match=r"model\.safetensors .*unknown update operator 'convnext'; .* raft, gma"):
        load_model(tmp_path / "model.safetensors")


def test_an_installed_operator_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: the ROS node and the trainer do not import the modules of others."""
    (tmp_path / "their_operator.py").write_text(
        "from deq_flow_ros.model.update import RaftUpdate\nclass Theirs(RaftUpdate):\n    pass\n"
    )
    information = tmp_path / "their_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[deq_flow_ros.update_operators]\ntheirs = their_operator:Theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = DEQFlow(replace(SIZES["nano"], update="theirs"))
    assert type(model.update_block).__name__ == "Theirs"


def test_what_is_no_operator_is_refused() -> None:
    """Why: each mistake with the registry has its own remedy."""
    with pytest.raises(ValueError, match="there is an update operator 'gma' already"):
        register_update_operator("gma")
    with pytest.raises(ValueError, match="unknown update operator 'lstm'; expected one of raft, gma"):
        DEQFlow(replace(SIZES["nano"], update="lstm"))
    register_update_operator("number")(lambda architecture: 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"'number' must make a torch\.nn\.Module, it made <class 'int'>"):
        DEQFlow(replace(SIZES["nano"], update="number"))


@pytest.mark.parametrize("update", ["raft", "gma"])
def test_an_iteration_keeps_one_layout(update: str) -> None:
    """Why: one tensor in another layout makes each convolution after it change that of all of its input; this once took
    a sixth of the GRU's time."""
    model = DEQFlow(replace(SIZES["nano"], update=update)).eval()
    with torch.inference_mode():
        encoding = model.encode(torch.rand(1, 3, 64, 80))
        state = model.initial_state(encoding)
        problem = model.problem(encoding, encoding, iterations=1)
        motion = model.update_block.encoder(problem.correlation.lookup(state[1]), state[1])
        for tensor in (motion, problem(*state)[0]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
