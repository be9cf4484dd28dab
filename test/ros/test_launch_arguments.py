# SPDX-License-Identifier: Apache-2.0
"""What launch files make of their arguments, from an installation, without starting nodes; and how launches end."""

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

pytest.importorskip("launch_ros", reason="launch_ros is not among the wheels: test/launch_environment.sh")
from installed_package import SHARE, install
from launch.actions import IncludeLaunchDescription, RegisterEventHandler
from launch.event_handlers import OnProcessStart
from launch.events.process import ProcessStarted
from launch.launch_description_sources import (
    PythonLaunchDescriptionSource,
    get_launch_description_from_python_launch_file,
)
from launch.logging import get_logger
from node_client import untrained_weights

from launch import LaunchContext, LaunchDescription, LaunchService


@pytest.fixture(scope="module")
def launch_folder(tmp_path_factory: pytest.TempPathFactory, ros_environment: None) -> Path:
    """The launch files of an installation that ROS finds first."""
    prefix = install(tmp_path_factory.mktemp("prefix"))
    os.environ["AMENT_PREFIX_PATH"] = os.pathsep.join([str(prefix), os.environ["AMENT_PREFIX_PATH"]])
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of the wrappers
    return prefix / SHARE / "launch"


def visit(path: Path, **arguments: str) -> list:
    """What `ros2 launch` does with a launch file before it starts processes; returns the actions for these."""
    context = LaunchContext()
    context.launch_configurations.update(arguments)
    description = get_launch_description_from_python_launch_file(str(path))
    return [action for entity in description.entities for action in entity.visit(context) or []]


@pytest.mark.parametrize("name", ["flow", "multi_camera", "replay", "view"])
def test_arguments_are_described(launch_folder: Path, name: str) -> None:
    """`ros2 launch --show-args` is where people look first; included files must show theirs as well."""
    description = get_launch_description_from_python_launch_file(str(launch_folder / f"{name}.launch.py"))
    arguments = {argument.name: argument.description for argument in description.get_launch_arguments()}
    assert all(arguments.values())
    assert {"image", "namespace", "params_file", "model", "device", "log_level", "rviz", "foxglove"} <= set(arguments)


@pytest.mark.parametrize(
    ("name", "word", "hint"),
    [
        ("flow", "imgae:=/camera", "image"),
        ("replay", "input_:=bag", "input"),
        ("view", "image_topic:=/x", ""),
        ("motion_mask", "imuu:=/imu", "imu"),
        ("time_to_contact", "imgae:=/camera", "image"),
        ("point_tracks", "imgae:=/camera", "image"),
        ("multi_camera", "camera:=front,rear", "cameras"),
    ],
)
def test_a_misspelt_argument_is_refused(
    launch_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, word: str, hint: str
) -> None:
    """`ros2 launch` passes over what it does not know, and the node waits for images on another topic."""
    monkeypatch.setattr("sys.argv", ["ros2", "launch", "deq_flow_ros", f"{name}.launch.py", word])
    with pytest.raises(RuntimeError, match=f"no argument '{word.partition(':=')[0]}'.*{hint}.*it has .*params_file"):
        visit(launch_folder / f"{name}.launch.py", input=str(launch_folder))
    for other in ("mine.launch.py", "flow.launch.py"):  # of a robot, which may include ours
        monkeypatch.setattr("sys.argv", ["ros2", "launch", "mine", other, word])
        visit(launch_folder / "flow.launch.py")


@pytest.mark.parametrize("name", ["motion_mask", "time_to_contact", "point_tracks"])
def test_a_missing_parameter_file_is_refused_before_anything_starts(launch_folder: Path, name: str) -> None:
    """An error ends the launch, but not the processes that it has started: the flow node would stay without it."""
    context, actions, argument = LaunchContext(), [], f"{name.split('_')[-1]}_params_file"
    context.launch_configurations[argument] = "/nowhere"
    description = get_launch_description_from_python_launch_file(str(launch_folder / f"{name}.launch.py"))
    with pytest.raises(RuntimeError, match=f"{argument}: expected the path of a file, got '/nowhere'"):
        for entity in description.entities:
            actions += entity.visit(context) or []
    assert actions == []


def test_cameras_of_a_parameter_file_are_not_left_without_topics(launch_folder: Path, tmp_path: Path) -> None:
    """The launch file sets topics by the cameras' names; the node would wait on others without a word."""
    parameters = tmp_path / "two.yaml"
    parameters.write_text("flow_node: {ros__parameters: {cameras: [left, right]}}\n")
    with pytest.raises(RuntimeError, match="cameras:=left,right"):
        visit(launch_folder / "flow.launch.py", params_file=str(parameters), image="/camera")
    visit(launch_folder / "flow.launch.py", params_file=str(parameters), cameras="left,right")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"params_file": "jetsam"}, "jetson.*got 'jetsam'"),
        ({"params_file": __file__}, f"params_file: {__file__} is no parameter file"),
        ({"cameras": "front,rear", "image": "/front"}, r"2 topic\(s\) in image.*got '/front'"),
        ({"image": "/a,/b"}, r"1 topic\(s\) in image"),
        ({"camera_info": "/a,/b"}, r"1 topic\(s\) in camera_info"),
        (
            {"cameras": "left,right", "image": "/rig/left,/rig/right", "camera_info": "/left,/right"},
            "namespaces of their own.*/rig/left, /rig/right",
        ),
        ({"remap": "/flow"}, "FROM:=TO.*got '/flow'"),
        ({"log_level": "loud"}, "loud"),
        ({"image_transport": "theora"}, "theora"),
        ({"foxglove": "yes"}, "yes"),
        ({"view": "true", "port": "http"}, "port: expected a port number such as 8080, got 'http'"),
        ({"view": "true", "host": "203.0.113.1"}, "view: cannot listen on 203.0.113.1"),
    ],
)
def test_arguments_that_cannot_be_are_named(launch_folder: Path, arguments: dict[str, str], words: str) -> None:
    """The error is all that is seen of a launch that does not start."""
    with pytest.raises(RuntimeError, match=words):
        visit(launch_folder / "flow.launch.py", **arguments)


def test_the_node_starts_without_viewers_that_are_not_installed(
    launch_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A robot has no RViz; the same launch line must work there, and say what is missing."""
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(launch_folder.parents[2]))
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", said.append)
    get_logger("flow.launch").addHandler(handler)
    actions = visit(launch_folder / "flow.launch.py", rviz="true", foxglove="true")
    get_logger("flow.launch").removeHandler(handler)
    assert [action.node_executable for action in actions] == ["flow_node"]
    assert [(record.levelname, record.getMessage().rpartition("-")[2]) for record in said] == [
        ("ERROR", "rviz2"),
        ("ERROR", "bridge"),
    ]


def test_the_page_is_of_the_node_that_is_launched_or_runs_already(launch_folder: Path) -> None:
    """Its name, camera and remapped topics are known to the launch file alone; a port in use ends it at once."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(RuntimeError, match=f"view: cannot listen on 127.0.0.1, port {port}: it is in use"):
            visit(launch_folder / "flow.launch.py", view="true", port=port)
    names = {"namespace": "robot", "name": "eye", "cameras": "left,right", "remap": "~/left/flow:=/flow"}
    for node, programs in (("true", ["flow_node", "flow_view"]), ("false", ["flow_view"])):
        actions = visit(launch_folder / "flow.launch.py", view="true", port=port, node=node, **names)
        assert [action.node_executable for action in actions] == programs
        context = LaunchContext()
        view = actions[-1]
        view._perform_substitutions(context)
        [(path, _)] = view._Node__expanded_parameter_arguments
        written = yaml.safe_load(Path(path).read_text())
        [parameters] = [section["ros__parameters"] for section in written.values()]
        assert parameters == {"node": "/robot/eye", "camera": "left", "host": "127.0.0.1", "port": int(port)}
        assert view.expanded_remapping_rules == [("/robot/eye/left/flow", "/flow")]


def test_foxglove_gets_a_layout_for_each_camera(
    launch_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot remap the topics of a file: panels of another name's topics stay empty."""
    bridge = tmp_path / "share" / "ament_index" / "resource_index" / "packages" / "foxglove_bridge"
    bridge.parent.mkdir(parents=True)
    bridge.touch()
    monkeypatch.setenv("AMENT_PREFIX_PATH", os.pathsep.join([os.environ["AMENT_PREFIX_PATH"], str(tmp_path)]))
    said: list[str] = []
    monkeypatch.setattr(get_logger("flow.launch"), "info", said.append)
    visit(launch_folder / "flow.launch.py", foxglove="true", image="/image")
    visit(launch_folder / "flow.launch.py", foxglove="true", namespace="robot", cameras="left,right")
    shipped, *made = [[Path(path) for path in line.partition("layout ")[2].split(" or ")] for line in said]
    assert shipped == [launch_folder.parent / "config" / "foxglove_layout.json"]
    for path, camera in zip(made[0], ("left", "right"), strict=True):
        layout = path.read_text()
        assert len(json.loads(layout)["configById"]) == len(json.loads(shipped[0].read_text())["configById"])
        assert f'"/robot/{camera}/image_raw"' in layout and f'"/robot/flow_node/{camera}/points"' in layout
        assert '"/flow_node' not in layout


Started = list[tuple[str, int]]
"""Names and process ids of the programs that a launch has started."""


def launch(path: Path, folder: Path, end: Callable[[Started], None] = len, **arguments: str) -> tuple[int, Started]:
    """The exit status of a launch with a small model, and what it started; `end` is called after each start."""
    parameters = folder / "small.yaml"
    parameters.write_text("/**: {ros__parameters: {warm_up_width: 0, warm_up_height: 0, threads: 1}}\n")
    usual = {"model": str(untrained_weights(folder)), "params_file": str(parameters)}
    started: Started = []

    def on_start(event: ProcessStarted, context: LaunchContext) -> None:
        started.append((event.action.node_executable, event.pid))
        end(started)

    service = LaunchService(noninteractive=True)
    source, watch = PythonLaunchDescriptionSource(str(path)), RegisterEventHandler(OnProcessStart(on_start=on_start))
    action = IncludeLaunchDescription(source, launch_arguments={**usual, **arguments}.items())
    service.include_launch_description(LaunchDescription([watch, action]))
    give_up = threading.Timer(60.0, service.shutdown)
    give_up.start()
    try:
        status = service.run()
        assert give_up.is_alive(), "the launch did not end by itself"
        return status, started
    finally:
        give_up.cancel()


@pytest.mark.parametrize(
    ("name", "dies", "others"),
    [
        ("flow", "flow_node", []),
        ("multi_camera", "flow_node", []),
        ("view", "flow_view", ["flow_node"]),
        ("motion_mask", "motion_mask", ["flow_node"]),
        ("time_to_contact", "flow_node", ["time_to_contact"]),
        ("point_tracks", "point_tracks", ["flow_node"]),
    ],
)
def test_a_launch_fails_with_the_first_of_its_nodes(
    launch_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dies: str, others: list[str]
) -> None:
    """Whoever started it learns of it; a mask without flow, or a page without a node, would wait for ever."""
    monkeypatch.setattr("sys.argv", ["ros2", "launch", "deq_flow_ros", f"{name}.launch.py"])

    def kill(started: Started) -> None:
        if len(started) == len(others) + 1:
            os.kill(dict(started)[dies], signal.SIGKILL)

    said: list[str] = []
    monkeypatch.setattr(get_logger("launch"), "error", said.append)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    status, started = launch(launch_folder / f"{name}.launch.py", tmp_path, kill, port=port)
    assert status == 1
    assert sorted(program for program, _ in started) == sorted([dies, *others])
    assert re.search(rf"{dies}-\d+ ended with status -9", said[-1])


def test_a_node_that_comes_back_ends_nothing(
    launch_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `respawn:=true` its end is what has been provided for."""
    monkeypatch.setattr("sys.argv", ["ros2", "launch", "deq_flow_ros", "flow.launch.py"])

    def kill(started: Started) -> None:
        os.kill(started[-1][1], signal.SIGKILL)
        assert len(started) == 1  # the second one ends the test

    _, started = launch(launch_folder / "flow.launch.py", tmp_path, kill, respawn="true")
    assert len(started) == 2


def test_a_launch_file_that_another_one_includes_ends_nothing(launch_folder: Path, tmp_path: Path) -> None:
    """A robot's launch file has nodes that must go on; whether they do is for that file to say."""
    path = launch_folder / "flow.launch.py"
    status, started = launch(path, tmp_path, lambda started: os.kill(started[0][1], signal.SIGKILL))
    assert (status, len(started)) == (0, 1)


def replay(launch_folder: Path, folder: Path, **arguments: str) -> tuple[int, Started]:
    """A replay of a few pictures."""
    for number in range(4):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((48, 64, 3), 40 * number, np.uint8))
    return launch(launch_folder / "replay.launch.py", folder, **{"input": str(folder), **arguments})


def test_a_replay_ends_with_its_recording(launch_folder: Path, tmp_path: Path) -> None:
    """Scripts wait for it."""
    status, started = replay(launch_folder, tmp_path)
    assert (status, len(started)) == (0, 2)


@pytest.mark.parametrize("wrong", [{"rate": "fast"}, {"rate": "0"}, {"input": "/nothing/here"}, {"topic": "/a"}])
def test_a_replay_that_cannot_be_starts_nothing(launch_folder: Path, tmp_path: Path, wrong: dict[str, str]) -> None:
    """A node left behind would take the images of the next replay."""
    status, started = replay(launch_folder, tmp_path, **wrong)
    assert status != 0
    assert started == []


def test_a_replay_whose_node_cannot_start_fails_at_once(launch_folder: Path, tmp_path: Path) -> None:
    """The player would wait two minutes for a node that has no model, and the launch would then report success."""
    began = time.monotonic()
    status, started = replay(launch_folder, tmp_path, model="/nothing/here.safetensors")
    assert status != 0
    assert len(started) == 2
    assert time.monotonic() - began < 60.0
