# SPDX-License-Identifier: Apache-2.0
"""The flow node on a robot: subscribes to one camera's images, or several cameras', and publishes their flow.

ros2 launch deq_flow_ros flow.launch.py image:=/camera/image_raw [params_file:=jetson] [device:=cuda] [rviz:=true] [...]
"""

import os
from pathlib import Path
from typing import Any

import yaml
from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from launch.actions import OpaqueFunction
from launch.logging import get_logger, launch_config
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from deq_flow_ros import did_you_mean
from deq_flow_ros.ros.launching import BOOLEAN, Arguments, described, our_node, share
from deq_flow_ros.ros.view import Board, ViewServer
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

CONFIG = share() / "config"
TEMPLATES = sorted(path.stem for path in CONFIG.glob("*.yaml"))
KEEP = "; empty = as params_file says"

ARGUMENTS: Arguments = {
    "namespace": ("", "namespace of the node"),
    "name": ("flow_node", "name of the node; its outputs are NAME/flow, NAME/flow_color and so on"),
    "image": (
        "",
        "image topic, raw or compressed; relative to the namespace without a leading slash. With several "
        "cameras: one for each, separated by commas. Empty = image, or NAME/image_raw for each camera",
    ),
    "camera_info": ("", "topic of the calibration, likewise; empty = the sibling of the image topic"),
    "cameras": (
        "",
        "names of several cameras, separated by commas (see multi_camera.launch.py); empty = one camera without a name",
    ),
    "remap": ("", "other topics and services of the node: FROM:=TO,..., such as ~/flow:=/front/flow"),
    "params_file": ("flow", "parameters: a path, or one of those that come with the package: " + ", ".join(TEMPLATES)),
    "model": ("", "model name or weights file" + KEEP),
    "device": ("", "cpu, cuda or cuda:N" + KEEP),
    "image_transport": ("", "auto, raw, compressed or video" + KEEP, ["", "auto", "raw", "compressed", "video"]),
    "autostart": ("", "configure and activate at start" + KEEP, ["", *BOOLEAN]),
    "exit_on_failure": ("", "end with status 1 where the node cannot start" + KEEP, ["", *BOOLEAN]),
    "use_sim_time": ("false", "take the time from /clock", BOOLEAN),
    "log_level": ("info", "of the node", ["debug", "info", "warn", "error", "fatal"]),
    "respawn": ("false", "start the node again when it ends", BOOLEAN),
    "node": ("true", "start the flow node; false = the viewers alone, for one of this name that runs already", BOOLEAN),
    "view": ("false", "serve a web page with live pictures (of the first camera)", BOOLEAN),
    "host": ("127.0.0.1", "address of the page; 0.0.0.0 = of all networks: whoever is there sees the camera"),
    "port": ("8080", "port of the page"),
    "rviz": ("false", "show image, flow and points in RViz (of the first camera)", BOOLEAN),
    "foxglove": ("false", "start foxglove_bridge; where the layout to import is, it says", BOOLEAN),
    "foxglove_port": ("8765", "port of foxglove_bridge"),
}


def _actions(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    params_file = _params_file(value["params_file"])
    cameras = _list(value["cameras"]) or [""]
    if cameras == [""]:
        _check_one_camera(params_file)
        inputs, default = ["~/image"], "image"
    else:
        inputs, default = [f"~/{camera}/image" for camera in cameras], ",".join(f"{c}/image_raw" for c in cameras)
    images = _one_for_each("image", value["image"] or default, cameras)
    remappings = list(zip(inputs, images, strict=True))
    if value["camera_info"]:
        infos = _one_for_each("camera_info", value["camera_info"], cameras)
        siblings = ["".join(image.rpartition("/")[:2]) + "camera_info" for image in images]  # as image_transport has it
        if len(set(siblings)) < len(siblings):  # one rule would hold for all of them
            raise RuntimeError(
                "camera_info: expected image topics in namespaces of their own, such as left/image and right/image, "
                f"got {', '.join(images)}: calibrations beside each other cannot be told apart; remap them where they "
                "are published"
            )
        remappings += list(zip(siblings, infos, strict=True))
    remappings += [_rule(text) for text in _list(value["remap"])]
    parameters: dict[str, str | bool | list[str]] = {"use_sim_time": value["use_sim_time"] == "true"}
    parameters |= {name: value[name] for name in ("model", "device", "image_transport") if value[name]}
    parameters |= {name: value[name] == "true" for name in ("autostart", "exit_on_failure") if value[name]}
    if cameras != [""]:
        parameters["cameras"] = cameras
    logger = ".".join([*value["namespace"].strip("/").split("/"), value["name"]]).lstrip(".")
    level = ["--log-level", f"{logger}:={value['log_level']}"]
    node = our_node(
        "flow_node", name=value["name"], namespace=value["namespace"], parameters=[params_file, parameters],
        remappings=remappings, ros_arguments=level, respawn=value["respawn"] == "true", respawn_delay=2.0,
    )  # fmt: skip
    viewers = [*_rviz(value, cameras[0], images[0]), *_foxglove(value, cameras, images)]
    return [*[node] * (value["node"] == "true"), *_view(value, cameras[0]), *viewers]


def _list(text: str) -> list[str]:
    """`a, b` or `[a, b]` as a list."""
    return [word for word in (word.strip() for word in text.strip().strip("[]").split(",")) if word]


def _one_for_each(argument: str, text: str, cameras: list[str]) -> list[str]:
    values = _list(text)
    if len(values) != len(cameras):
        raise RuntimeError(f"expected {len(cameras)} topic(s) in {argument}, one for each camera, got {text!r}")
    return values


def _rule(text: str) -> tuple[str, str]:
    name, assigned, other = text.partition(":=")
    if not (name and assigned and other):
        raise RuntimeError(f"expected remap:=FROM:=TO,..., got {text!r}")
    return name, other


def _params_file(name: str) -> str:
    path = CONFIG / f"{name}.yaml" if name in TEMPLATES else Path(name).expanduser()
    if not path.is_file():
        hint = did_you_mean(name, TEMPLATES)
        raise RuntimeError(f"params_file: expected a path or one of {', '.join(TEMPLATES)}, got {name!r}{hint}")
    return str(path)


def _check_one_camera(params_file: str) -> None:
    """The topics are set here by the cameras' names: a file that has others would leave them without images."""
    try:
        tree = yaml.safe_load(Path(params_file).read_text()) or {}
    except (ValueError, yaml.YAMLError):  # UnicodeDecodeError is a ValueError
        tree = None
    if not isinstance(tree, dict):
        raise RuntimeError(
            f"params_file: {params_file} is no parameter file: expected YAML with NODE: ros__parameters: NAME: VALUE"
        )
    for node, section in tree.items():
        named = section.get("ros__parameters", {}).get("cameras", [""]) if isinstance(section, dict) else [""]
        if named != [""]:
            raise RuntimeError(
                f"{params_file} has the cameras {named} for {node}: name them in the launch argument cameras instead "
                f"(cameras:={','.join(named)}), which also sets their image topics"
            )


def _absolute(value: dict[str, str], topic: str) -> str:
    return topic if topic.startswith("/") else f"/{value['namespace'].strip('/')}/{topic}".replace("//", "/")


def _outputs(value: dict[str, str], camera: str) -> str:
    """Where the node publishes what belongs to a camera."""
    return _absolute(value, f"{value['name']}/{camera}".rstrip("/"))


def _port(value: dict[str, str], argument: str) -> int:
    text, example = value[argument], ARGUMENTS[argument][0]
    if not (text.isascii() and text.isdecimal() and int(text) < 2**16):
        raise RuntimeError(f"{argument}: expected a port number such as {example}, got {text!r}")
    return int(text)


def _view(value: dict[str, str], camera: str) -> list[LaunchDescriptionEntity]:
    if value["view"] != "true":
        return []
    port, own = _port(value, "port"), _outputs(value, "")
    try:  # before anything starts
        ViewServer(Board(), value["host"], port, []).server_close()
    except OSError as error:
        raise RuntimeError(f"view: {error}") from None
    parameters = {"node": own, "camera": camera, "host": value["host"], "port": port}
    rules = [(own + name[1:], other) for name, other in map(_rule, _list(value["remap"])) if name.startswith("~")]
    return [our_node("flow_view", namespace=value["namespace"], parameters=[parameters], remappings=rules)]


def _viewer(value: dict[str, str], argument: str, package: str, **more: Any) -> list[LaunchDescriptionEntity]:
    """A program of others; the flow node must run without, so a missing one is an error line and no more."""
    try:
        get_package_prefix(package)
    except PackageNotFoundError:
        apt = f"ros-{os.environ.get('ROS_DISTRO', 'jazzy')}-{package.replace('_', '-')}"
        get_logger("flow.launch").error(
            f"{argument}:=true needs the package {package}, which is not installed: sudo apt install {apt}"
        )
        return []
    parameters = [{"use_sim_time": value["use_sim_time"] == "true", **more.pop("parameters", {})}]
    return [Node(package=package, executable=package, parameters=parameters, output="screen", **more)]


def _rviz(value: dict[str, str], camera: str, image: str) -> list[LaunchDescriptionEntity]:
    if value["rviz"] != "true":
        return []
    # The topics of config/flow.rviz are those of the defaults; remapping makes the one file fit every name.
    own, names = _outputs(value, camera), ("flow_color", "residual", "uncertainty", "points")
    rules = [("/image", _absolute(value, image)), *((f"/flow_node/{name}", f"{own}/{name}") for name in names)]
    words = ["-d", str(CONFIG / "flow.rviz")]
    return _viewer(value, "rviz", "rviz2", name="flow_rviz", arguments=words, remappings=rules)


def _foxglove(value: dict[str, str], cameras: list[str], images: list[str]) -> list[LaunchDescriptionEntity]:
    if value["foxglove"] != "true":
        return []
    port = _port(value, "foxglove_port")
    found = _viewer(value, "foxglove", "foxglove_bridge", name="flow_foxglove_bridge", parameters={"port": port})
    if found:
        layouts = " or ".join(_foxglove_layout(value, *one) for one in zip(cameras, images, strict=True))
        get_logger("flow.launch").info(f"Foxglove: connect to ws://localhost:{port} and import the layout {layouts}")
    return found


def _foxglove_layout(value: dict[str, str], camera: str, image: str) -> str:
    """Path of the layout with the names of this launch, but not what `remap` makes of them: Foxglove cannot remap those
    of a file.
    """
    layout = CONFIG / "foxglove_layout.json"
    own, image = _outputs(value, camera), _absolute(value, image)
    if (own, image) == ("/flow_node", "/image"):
        return str(layout)
    text = layout.read_text().replace('"/image"', f'"{image}"').replace('"/flow_node/', f'"{own}/')
    path = Path(launch_config.log_dir) / f"foxglove_layout{own.replace('/', '_')}.json"
    path.write_text(text)
    return str(path)


def generate_launch_description() -> LaunchDescription:
    """Arguments, the node and the viewers asked for."""
    return described(__file__, ARGUMENTS, OpaqueFunction(function=_actions))
