# SPDX-License-Identifier: Apache-2.0
"""The parameter table, the file that documents it, and the answers to wrong values."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from deq_flow_ros.ros.parameters import Settings, check_change, misspelt_overrides
from deq_flow_ros.streaming.costs import MIN_SCALED_SIDE

CONFIG = Path(__file__).parent.parent / "config" / "flow.yaml"


@pytest.fixture(autouse=True)
def ros_context() -> Iterator[None]:
    rclpy.init()
    yield
    rclpy.try_shutdown()


def make_node(**values: object) -> Node:
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    node = Node("parameters_under_test", parameter_overrides=overrides)
    Settings.declare(node)
    return node


def test_the_config_file_lists_every_parameter_with_its_default() -> None:
    """The file is the documentation users read: it must not fall behind the table."""
    listed = yaml.safe_load(CONFIG.read_text())["/**"]["ros__parameters"]
    assert listed == dataclasses.asdict(Settings())


def test_the_config_file_states_each_range() -> None:
    """A range in a comment that is not the one enforced is worse than none."""
    blocks = CONFIG.read_text().split("\n    ")
    for field in dataclasses.fields(Settings):
        index = next(i for i, block in enumerate(blocks) if block.startswith(f"{field.name}:"))
        while not blocks[index].startswith("#"):  # two parameters may share a comment
            index -= 1
        comment = ""
        while blocks[index].startswith("#"):
            comment = blocks[index] + comment
            index -= 1
        if field.metadata["maximum"] is not None:
            assert f" to {field.metadata['maximum']:.10g}" in comment, field.name
        assert all(choice in comment for choice in field.metadata["choices"]), field.name
        assert f"[{field.metadata['unit']}]" in comment or field.metadata["unit"] in ("", "images"), field.name


def test_the_smallest_image_is_stated_where_users_read_of_min_scale() -> None:
    """A QVGA camera never reaches the default of min_scale, and its user would look for the reason elsewhere."""
    words = f"{MIN_SCALED_SIDE} px on their short side"
    field = next(field for field in dataclasses.fields(Settings) if field.name == "min_scale")
    texts = (field.metadata["description"], CONFIG.read_text(), (CONFIG.parent.parent / "docs" / "node.md").read_text())
    assert all(words in " ".join(text.replace("#", " ").split()) for text in texts)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_iterations", 0, ["max_iterations", "Min: 1"]),
        ("max_iterations", 2.5, ["max_iterations", "INTEGER"]),
        ("latency_budget_ms", -1.0, ["latency_budget_ms", "Min: 0.0"]),
        ("latency_budget_ms", float("nan"), ["latency_budget_ms", "nan"]),
        ("min_scale", 1.5, ["min_scale", "Max: 1.0"]),
        ("model", 3, ["model", "STRING"]),
    ],
)
def test_a_wrong_value_at_start_is_refused(name: str, value: object, words: list[str]) -> None:
    """The node must not run with something else than what was asked for."""
    with pytest.raises(ParameterException) as error:
        make_node(**{name: value})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_change_is_refused_with_a_reason() -> None:
    """Wrong words, and values that would have no effect before the next configure."""
    result = check_change([Parameter("direction", value="sideways")], configured=False)
    assert not result.successful and "expected one of forward, backward, got 'sideways'" in result.reason
    result = check_change([Parameter("max_iterations", value=3)], configured=True)
    assert not result.successful and "cleanup" in result.reason
    assert check_change([Parameter("max_iterations", value=3)], configured=False).successful
    assert check_change([Parameter("use_sim_time", value=True)], configured=True).successful


def test_values_that_do_not_go_together_are_named() -> None:
    """Each is in range, the pair is not."""
    with pytest.raises(ValueError, match=r"both 0 or both at least 16, got \(640, 0\)"):
        Settings.read(make_node(warm_up_height=0))


def test_a_misspelt_parameter_is_reported() -> None:
    """ROS ignores it silently, and the user wonders why nothing changed."""
    assert misspelt_overrides(make_node(max_iteration=3)) == [
        "no parameter 'max_iteration'; did you mean 'max_iterations'?"
    ]
