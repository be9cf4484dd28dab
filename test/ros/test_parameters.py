# SPDX-License-Identifier: Apache-2.0
"""The parameter table, the file that documents it, and the answers to wrong values."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter

from deq_flow_ros.model.deq_flow import MAX_PIXELS, MAX_PIXELS_ALL_PAIRS
from deq_flow_ros.ros.parameter_table import files_for_others, unused_overrides
from deq_flow_ros.ros.parameters import NodeSettings, check_change
from deq_flow_ros.ros.process import end_node
from deq_flow_ros.streaming.eager import COARSE_ITERATIONS, COARSE_LEVELS
from deq_flow_ros.streaming.plan import MIN_SCALED_SIDE

CONFIG = Path(__file__).parents[2] / "config" / "flow.yaml"


MADE: list[Node] = []


@pytest.fixture(autouse=True, scope="module")
def ros_context() -> Iterator[None]:
    """One participant of DDS for all tests, which a node of no other use keeps; each takes a tenth of a second."""
    rclpy.init()
    keeper = Node("keeper")
    yield
    keeper.destroy_node()
    rclpy.try_shutdown()


@pytest.fixture(autouse=True)
def nodes_end_with_their_test() -> Iterator[None]:
    """Many participants of DDS in one process have blocked each other."""
    yield
    while MADE:
        MADE.pop().destroy_node()


def bare_node(name: str, **options: Any) -> Node:
    MADE.append(Node(name, **options))
    return MADE[-1]


def make_node(**values: object) -> Node:
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    node = bare_node("parameters_under_test", parameter_overrides=overrides)
    NodeSettings.declare(node)
    return node


def test_an_executor_ends_with_its_node() -> None:
    """Kilted's, left to the end of the process, may print an error there."""
    node, executor = Node("ends_with_its_executor"), SingleThreadedExecutor()
    executor.add_node(node)
    end_node(node)
    assert executor.get_nodes() == []


def test_the_config_file_lists_every_parameter_with_its_default() -> None:
    """The file is the documentation users read: it must not fall behind the table."""
    listed = yaml.safe_load(CONFIG.read_text())["/**"]["ros__parameters"]
    values = dataclasses.asdict(NodeSettings())
    assert listed == {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def test_the_smallest_image_is_stated_where_users_read_of_min_scale() -> None:
    """A QVGA camera never reaches the default of min_scale, and its user would look for the reason elsewhere."""
    words = f"{MIN_SCALED_SIDE} px on their short side"
    field = next(field for field in dataclasses.fields(NodeSettings) if field.name == "min_scale")
    texts = (field.metadata["description"], CONFIG.read_text(), (CONFIG.parent.parent / "docs" / "node.md").read_text())
    assert all(words in " ".join(text.replace("#", " ").split()) for text in texts)


def test_the_largest_image_is_stated_where_users_read_of_max_scale() -> None:
    """Who asks for more is given less, and would look for the reason elsewhere."""
    field = next(field for field in dataclasses.fields(NodeSettings) if field.name == "max_scale")
    pages = (CONFIG, *((CONFIG.parent.parent / "docs" / name) for name in ("node.md", "troubleshooting.md")))
    for text in (field.metadata["description"], *(page.read_text() for page in pages)):
        assert f"{MAX_PIXELS:,} pixels" in text and f"{MAX_PIXELS_ALL_PAIRS:,} by a model" in " ".join(text.split())


def test_the_iterations_of_a_cold_start_are_stated() -> None:
    """They come on top of max_iterations, so whoever wants the shortest time must know of them."""
    field = next(field for field in dataclasses.fields(NodeSettings) if field.name == "max_iterations")
    assert COARSE_LEVELS == 2 and f"{COARSE_ITERATIONS} more at each of two" in field.metadata["description"]


@pytest.mark.parametrize("path", sorted(CONFIG.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_file_that_ships_is_taken_as_it_is(path: Path) -> None:
    """ROS reads these files by rules of its own, and drops a name that it does not know silently."""
    node = bare_node("flow_node", cli_args=["--ros-args", "--params-file", str(path)])
    NodeSettings.declare(node)
    listed = yaml.safe_load(path.read_text())["/**"]["ros__parameters"]
    assert unused_overrides(node, NodeSettings.names()) == []
    values = dataclasses.asdict(NodeSettings.read(node))
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if name in listed} == listed


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_iterations", 0, ["max_iterations", "Min: 1"]),
        ("max_iterations", 2.5, ["max_iterations", "INTEGER"]),
        ("latency_budget_ms", -1.0, ["latency_budget_ms", "Min: 0.0"]),
        ("latency_budget_ms", float("nan"), ["latency_budget_ms", "nan"]),
        ("min_scale", 4.5, ["min_scale", "Max: 4.0"]),
        ("cameras", "front", ["cameras", "STRING_ARRAY"]),
        ("model", 3, ["model", "STRING"]),
    ],
)
def test_a_wrong_value_at_start_is_refused(name: str, value: object, words: list[str]) -> None:
    """The node must not run with something else than what was asked for."""
    with pytest.raises(ParameterException) as error:
        make_node(**{name: value})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_whole_number_is_taken_for_a_real_one() -> None:
    """Who types `-p latency_budget_ms:=50` means 50.0; ROS's own words for it name types and no cure."""
    assert NodeSettings.read(make_node(latency_budget_ms=50)).latency_budget_ms == 50.0
    node = make_node()
    assert node.set_parameters_atomically([Parameter("latency_budget_ms", value=70)]).successful
    assert node.get_parameter("latency_budget_ms").value == 70.0


def test_a_parameter_that_there_is_not_is_refused_by_name() -> None:
    """rclpy answers with the text of an exception, without what might have been meant."""
    node = make_node()
    two = [Parameter("max_iterations", value=3), Parameter("latency_budget", value=3.0)]
    answer = node.set_parameters_atomically(two)
    assert not answer.successful and node.get_parameter("max_iterations").value == NodeSettings.max_iterations
    assert answer.reason == "no parameter 'latency_budget' (did you mean 'latency_budget_ms'?); nothing was changed"


@pytest.mark.parametrize(
    ("content", "matches"),
    [
        ("/**: {ros__parameters: {threads: 1}}", True),
        ("flow_node: {ros__parameters: {threads: 1}}", False),  # the node has a namespace
        ("/robot/flow_node: {ros__parameters: {threads: 1}}", True),
        ("robot: {flow_node: {ros__parameters: {threads: 1}}}", True),
        ("/*/flow_node: {ros__parameters: {threads: 1}}", True),
        ("/other: {ros__parameters: {threads: 1}}\n/**/flow_node: {ros__parameters: {}}", True),
        ("/other: {ros__parameters: {threads: 1}}", False),
        ("/**/other: {ros__parameters: {threads: 1}}", False),
        ("/*: {ros__parameters: {threads: 1}}", False),  # those without a namespace
        ("threads: 1", True),  # ROS says what is wrong with it
    ],
)
def test_a_parameter_file_for_another_node_is_named(tmp_path: Path, content: str, matches: bool) -> None:
    """Whoever renames the node, or misspells it in the file, would run on defaults without a word."""
    path = tmp_path / "parameters.yaml"
    path.write_text(content)
    lines = files_for_others(["node", "--ros-args", "--params-file", str(path)], "/robot/flow_node")
    assert (lines == []) == matches
    assert matches or (f"{path} has values for /" in lines[0] and "none for /robot/flow_node" in lines[0])
    path.write_text("a text")  # ROS takes it for a file without values
    (line,) = files_for_others(["node", "--ros-args", "--params-file", str(path)], "/robot/flow_node")
    assert f"{path} is no parameter file" in line


def test_every_parameter_is_described_to_ros() -> None:
    """`ros2 param describe`, rqt and Foxglove show what is declared, nothing else."""
    node = make_node()
    for field in dataclasses.fields(NodeSettings):
        descriptor = node.describe_parameter(field.name)
        assert len(descriptor.description) > 20, field.name
        number = isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
        assert bool(descriptor.integer_range or descriptor.floating_point_range) == number, field.name


def answer(configured: bool, node: Node | None = None, **values: object) -> str:
    """The reason of refusal of a change, or an empty text."""
    parameters = [Parameter(name, value=value) for name, value in values.items()]
    return check_change(parameters, node or make_node(), configured).reason


def test_a_change_is_refused_with_a_reason() -> None:
    """Wrong words, and values that would have no effect before the next configure."""
    assert answer(False, direction="sideways").endswith("expected one of forward, backward, got 'sideways'")
    assert answer(False, direction="Forwards").endswith("got 'Forwards' (did you mean 'forward'?)")
    assert "device is read in configure: call the transitions" in answer(True, device="cuda")
    assert answer(False, device="cuda") == answer(True, max_iterations=3) == answer(True, use_sim_time=True) == ""


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("roi", [[0, 0, 64], [-1, 0, 64, 48], [0, 0, 0, 48], [0, 0, 15, 48], [0, 0, 2**31, 48], []])
def test_a_region_that_cannot_be_is_refused(roi: list[int], configured: bool) -> None:
    """ROS knows no ranges of arrays; every image would be dropped."""
    reason = check_change([Parameter("roi", Parameter.Type.INTEGER_ARRAY, roi)], make_node(), configured).reason
    assert "roi: expected [x, y, width, height]" in reason and str(roi) in reason


@pytest.mark.parametrize("ends", [[0], [5, 5], [9, 3], [-1, 10], [0, 2**16], []])
def test_a_range_of_counts_that_cannot_be_is_refused(ends: list[int]) -> None:
    """Every image would be black, or dropped."""
    parameter = Parameter("intensity_range", Parameter.Type.INTEGER_ARRAY, ends)
    reason = check_change([parameter], make_node(), True).reason
    assert "intensity_range: expected [black, white]" in reason and str(ends) in reason


@pytest.mark.parametrize("names", [["front", ""], ["front", "front"], ["front/left"], ["1st"], ["~"], [""] * 2, []])
def test_names_of_cameras_must_be_names_of_topics(names: list[str]) -> None:
    """Two cameras on one topic would mix two streams into one; a bad name would fail only in configure."""
    reason = check_change([Parameter("cameras", Parameter.Type.STRING_ARRAY, names)], make_node(), False).reason
    assert "cameras: expected" in reason and str(names) in reason


def test_values_that_do_not_go_together_are_named() -> None:
    """Each is in range, the pair is not."""
    with pytest.raises(ValueError, match=r"both 0 or both at least 16, got \(640, 0\)"):
        NodeSettings.read(make_node(warm_up_height=0))
    with pytest.raises(ValueError, match=r"min_scale <= max_scale, got 2 and 1"):
        NodeSettings.read(make_node(min_scale=2.0))
    with pytest.raises(ValueError, match=r"max_rate_hz 0.5 leaves 2000 ms .* max_gap_ms 1000 takes for gaps"):
        NodeSettings.read(make_node(max_rate_hz=0.5))
    assert NodeSettings.read(make_node(max_rate_hz=0.5, max_gap_ms=2500.0)).max_rate_hz == 0.5
    node = make_node()
    assert "max_rate_hz 30 leaves 33.3333 ms" in answer(True, node, max_rate_hz=30.0, max_gap_ms=33.0)
    assert "min_scale <= max_scale, got 0.25 and 0.125" in answer(True, node, max_scale=0.125)
    assert answer(True, node, max_scale=0.125, min_scale=0.125) == ""  # both in one request
    assert answer(False, node, max_scale=0.125) == ""  # one after the other, until configure


def test_arrays_are_read_as_they_are_set() -> None:
    """rclpy returns arrays of its own kind, which compare as different from everything."""
    settings = NodeSettings.read(make_node(cameras=["front", "rear"], roi=[1, 2, 30, 40]))
    assert settings.cameras == ("front", "rear") and settings.roi == (1, 2, 30, 40)


def test_a_misspelt_parameter_is_reported() -> None:
    """ROS ignores it silently, and the user wonders why nothing changed."""
    assert unused_overrides(make_node(max_iteration=3), NodeSettings.names()) == [
        "no parameter 'max_iteration' (did you mean 'max_iterations'?): its value changes nothing"
    ]


def with_file(folder: Path, text: str) -> Node:
    """A node whose parameters a file sets."""
    path = folder / "parameters.yaml"
    path.write_text(f"/**: {{ros__parameters: {{{text}}}}}\n")
    node = bare_node("flow_node", cli_args=["--ros-args", "--params-file", str(path)])
    NodeSettings.declare(node)
    return node


def test_an_empty_list_in_a_file_stands_for_the_default_and_no_value_at_all_is_named(tmp_path: Path) -> None:
    """YAML gives neither a type; the node ended in a traceback."""
    assert NodeSettings.read(with_file(tmp_path, "cameras: [], roi: [], threads: 3")) == dataclasses.replace(
        NodeSettings(), threads=3
    )
    with pytest.raises(ParameterException, match="max_iterations: expected a value of type int, got none"):
        with_file(tmp_path, "max_iterations: []")


def test_what_was_dumped_from_a_node_is_taken_again_by_it() -> None:
    """`ros2 param dump` writes all parameters, and `ros2 param load` sets them all, one by one."""
    overrides = [Parameter("cameras", value=["front", "rear"]), Parameter("roi", value=[1, 2, 30, 40])]
    node, new = bare_node("dumped", parameter_overrides=overrides), list[Parameter]()
    NodeSettings.declare(node, new.extend)
    of_ros = ("use_sim_time", "start_type_description_service")
    names = [*(field.name for field in dataclasses.fields(NodeSettings)), *of_ros]
    dumped = [Parameter.from_parameter_msg(node.get_parameter(name).to_parameter_msg()) for name in names]
    assert all(node.set_parameters_atomically([parameter]).successful for parameter in dumped)
    assert node.set_parameters_atomically(dumped).successful and new == []
    assert node.set_parameters_atomically([*dumped, Parameter("max_gap_ms", value=2000)]).successful
    assert [(parameter.name, parameter.value) for parameter in new] == [("max_gap_ms", 2000.0)]
    assert not node.set_parameters_atomically([*dumped, Parameter("autostart", value=False)]).successful
