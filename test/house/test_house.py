# SPDX-License-Identifier: Apache-2.0
"""The order of the house: layers know only those below them, no circles, no private names of others, no long files."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = {
    "deq_flow_ros.equilibrium": set(),
    "deq_flow_ros.model": {"equilibrium"},
    "deq_flow_ros.streaming": {"equilibrium", "model"},
    "deq_flow_ros.imaging": set(),
    "deq_flow_ros.recordings": {"imaging"},
    "deq_flow_ros.demo": {"imaging", "recordings"},
    "deq_flow_ros.perception": {"imaging"},
    "deq_flow_ros.evaluation": {"equilibrium", "model", "streaming", "imaging", "recordings", "demo"},
    "deq_flow_ros.ros": {"equilibrium", "model", "streaming", "imaging", "recordings", "perception"},
    "deq_flow_ros.live": {"equilibrium", "model", "streaming", "imaging", "recordings", "demo", "evaluation", "ros"},
    "training": {"equilibrium", "model", "streaming", "imaging", "recordings"},
    "benchmarks": {
        "equilibrium",
        "model",
        "streaming",
        "imaging",
        "recordings",
        "demo",
        "perception",
        "evaluation",
        "training",
    },
}
"""What each package may import of the others, as in docs/design.md. Single modules of `deq_flow_ros` are for all."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages by its dotted name, parsed."""
    found = {}
    for package in ("deq_flow_ros", "training", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> list[tuple[str, str]]:
    """(module, name taken from it or "") of every import, those for type checking and those in functions included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def edges() -> dict[str, set[str]]:
    """The modules of ours that each module imports; a name that is a module counts as that module."""
    return {
        name: {f"{module}.{taken}" if f"{module}.{taken}" in modules() else module for module, taken in imports(tree)}
        & set(modules())
        for name, tree in modules().items()
    }


def layer_of(module: str) -> str | None:
    return next((layer for layer in LAYERS if module == layer or module.startswith(f"{layer}.")), None)


def test_no_imports_go_round_in_a_circle() -> None:
    """Why: of modules in a circle none can be read, tested or replaced alone."""
    graph = edges()
    assert sum(map(len, graph.values())) > 300  # else the imports were not found
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_each_layer_knows_those_below_it_alone() -> None:
    """Why: the method must run without ROS, and a robot without the training."""
    wrong = []
    for module, imported in edges().items():
        if (layer := layer_of(module)) is None:
            continue
        for other in imported:
            below = layer_of(other)
            if below not in (None, layer) and below.removeprefix("deq_flow_ros.") not in LAYERS[layer]:
                wrong.append(f"{module} imports {other}")
    assert wrong == []
    for name, tree in modules().items():
        if layer_of(name) not in ("deq_flow_ros.ros", "deq_flow_ros.live"):
            assert "rclpy" not in {module.split(".")[0] for module, _ in imports(tree)}, name


def test_no_private_name_leaves_its_module() -> None:
    """Why: who takes a private name of another module breaks with any change of it."""
    wrong = []
    for name, tree in modules().items():
        own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node)}
        own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not is_self(node)]
        wrong += [f"{name}: {ast.unparse(node)}" for node in used if is_private(node.attr) and node.attr not in own]
        wrong += [f"{name} imports {what} of {module}" for module, what in imports(tree) if is_private(what)]
    assert set(wrong) == KNOWN_PRIVATE


def is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


KNOWN_PRIVATE = {
    "deq_flow_ros.equilibrium.fixed_point: old._version",
    "deq_flow_ros.equilibrium.fixed_point: tensor._version",
    "training.run: torch.nn.modules.batchnorm._BatchNorm",
}
"""Of libraries, which have no public name for it."""


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    """Why: a file above 300 lines does more than one thing."""
    folders = ("deq_flow_ros", "training", "benchmarks", "test", "launch")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    long = {str(path.relative_to(ROOT)) for path in paths if len(path.read_text().splitlines()) > 300}
    assert long == set()
