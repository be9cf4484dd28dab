# SPDX-License-Identifier: Apache-2.0
"""Runs `flow_node` for minutes and holds it to its promises; not collected by pytest.

    python test/soak_flow_node.py --input VIDEO --minutes 5 --rate 30 --size 640x480 --budget-ms 150
    python test/soak_flow_node.py --input VIDEO --minutes 2 --cameras 2 --misbehave
    python test/soak_flow_node.py --input VIDEO --overhead      # what the node costs beside its estimator

Node and cameras are processes of their own over DDS. Checked: exactly one account per image published, each flow field
against its account, the node's memory once a second, and late fields. With --cameras 2 the second camera has half the
size and two thirds of the rate; with --misbehave the last one floods, falls silent, changes size and loops its clock,
and the others must not suffer. With --overhead: the time from an image's going out to its flow's coming in, less that
of the estimator, and in the same run, for comparison, that of a node in Python which computes nothing (`relay`).

The last line is "PASS" or "FAIL", with the bounds that are broken. Exit status: 0 all bounds hold, 1 one is broken, 2
unusable input or a process failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rich.console import Console
from sensor_msgs.msg import Image

ROOT = Path(__file__).parent.parent
# Neither this process nor its children may depend on whether, or which, package is installed.
PLACES = [str(ROOT), str(ROOT / "test")]
sys.path[:0] = PLACES

from soak_parts import RELAY_INPUT, RELAY_OUTPUT, half, image_size
from soak_report import Camera, Relay, accounts, beside_the_misbehaving, bounds, memory_of, show, timing

from deq_flow_ros.host import keep_freed_memory
from deq_flow_ros.live import run as live_run
from deq_flow_ros.live.children import ChildError, Children
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.flow_recording import report_of
from deq_flow_ros.ros.snapshot import versions

READY_S, QUIET_S = 120.0, 3.0
RELIABLE_DEPTH = 100


def cameras_of(options: argparse.Namespace) -> list[Camera]:
    """One camera without a name, or several with names, every other one smaller and slower."""
    if options.cameras == 1:
        return [Camera("", options.size, options.rate)]
    cameras = [
        Camera(f"camera_{number}", half(options.size), options.rate * 2 / 3)
        if number % 2
        else Camera(f"camera_{number}", options.size, options.rate)
        for number in range(options.cameras)
    ]
    cameras[-1].misbehaves = options.misbehave
    return cameras


class Run:
    """Starts the processes, listens, and measures the node's memory."""

    def __init__(self, options: argparse.Namespace, cameras: list[Camera], children: Children) -> None:
        self._options = options
        self._cameras = cameras
        self._children = children
        self.relay = Relay() if options.overhead else None
        self.memory: list[tuple[int, float]] = []
        """(`time.monotonic_ns`, MB)."""
        self._next_sample_s = 0.0
        self._node = Node("soak")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        for camera in cameras:
            self._listen(camera)
        if self.relay is not None:
            self._node.create_subscription(Image, RELAY_OUTPUT, self.relay.take, qos_profile_sensor_data, raw=True)

    def _listen(self, camera: Camera) -> None:
        topic = f"/flow_node/{camera.prefix}"
        self._node.create_subscription(
            DiagnosticArray,
            f"{topic}statistics",
            lambda message: camera.reports.append(report_of(message)),
            QoSProfile(depth=1000),
        )
        flow_qos = QoSProfile(depth=RELIABLE_DEPTH) if self._options.reliable else qos_profile_sensor_data
        self._node.create_subscription(Image, f"{topic}flow", camera.take_flow, flow_qos, raw=True)

    def __call__(self, logs: Path) -> None:
        """The whole run. Raises `ChildError` when a process fails or the node does not come up."""
        options, children = self._options, self._children
        parameters = {
            "model": options.model,
            "latency_budget_ms": float(options.budget_ms),
            "max_iterations": options.max_iterations,
            **(reliable_parameters(self._cameras) if options.reliable else {}),
            **dict(word.split(":=", 1) for word in options.parameter),
        }
        if self._cameras[0].name:
            parameters["cameras"] = json.dumps([camera.name for camera in self._cameras])
        words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        for camera in self._cameras:
            words += ["-r", f"~/{camera.prefix}image:={camera.input}"]
        children.start("flow_node", "deq_flow_ros.ros.flow_node", ["--ros-args", *words])
        if options.busy_neighbour:
            children.start("neighbour", "soak_parts", ["neighbour"])
        if self.relay is not None:
            children.start("relay", "soak_parts", ["relay"])
        self._until(self._connected, READY_S, "did not come up")
        seconds = 60.0 * options.minutes
        for camera in self._cameras:
            words = ["camera", "--name", camera.label, "--topic", camera.input, "--input", options.input]
            words += ["--size", "{}x{}".format(*camera.size), "--rate", str(camera.rate), "--seconds", str(seconds)]
            words += ["--log", str(logs / f"{camera.label}.jsonl")]
            if camera.misbehaves:
                words.append("--misbehave")
            if self.relay is not None:
                words += ["--topic", RELAY_INPUT, "--log", str(logs / "relay.jsonl")]
            children.start(camera.label, "soak_parts", words)
        self._until(self._cameras_ended, seconds + READY_S, "kept its cameras waiting")
        children.check()
        for camera in self._cameras:
            camera.published_ns = read_log(logs / f"{camera.label}.jsonl")
        if self.relay is not None:
            self.relay.published_ns = read_log(logs / "relay.jsonl")
        self._drain()
        children.stop("flow_node", 20.0)
        self._node.destroy_node()

    def _connected(self) -> bool:
        topics = [f"/flow_node/{camera.prefix}{name}" for camera in self._cameras for name in ("statistics", "flow")]
        return all(self._node.count_publishers(topic) for topic in topics) and all(
            self._node.count_subscribers(camera.input) for camera in self._cameras
        )

    def _cameras_ended(self) -> bool:
        now_s = time.monotonic()
        if now_s >= self._next_sample_s:
            self._next_sample_s = now_s + 1.0
            pages = int(Path(f"/proc/{self._children.pid('flow_node')}/statm").read_text().split()[1])
            self.memory.append((time.monotonic_ns(), pages * os.sysconf("SC_PAGESIZE") / 1e6))
        return not any(self._children.running(camera.label) for camera in self._cameras)

    def _drain(self) -> None:
        """Until every image is accounted for, or nothing is heard for a while."""
        heard, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < QUIET_S:
            if any(len(camera.reports) < len(camera.published_ns) for camera in self._cameras):
                now = sum(len(camera.reports) for camera in self._cameras)
                heard, since_s = now, since_s if now == heard else time.monotonic()
            elif heard != -2:
                heard, since_s = -2, time.monotonic() - QUIET_S + 0.5  # the last flow is on its way
            self._executor.spin_once(timeout_sec=0.05)

    def _until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        give_up = time.monotonic() + timeout_s
        while not condition():
            self._children.check()
            if time.monotonic() > give_up:
                raise self._children.failure("flow_node", f"{what} within {timeout_s:g} s")
            self._executor.spin_once(timeout_sec=0.05)


def reliable_parameters(cameras: list[Camera]) -> dict[str, object]:
    """Of a node that loses no image and no flow on the way, however long a process waits for the processor."""
    flow = {"reliability": "reliable", "depth": RELIABLE_DEPTH}
    return {"qos_reliability": "reliable", "qos_depth": RELIABLE_DEPTH} | {
        f"qos_overrides./flow_node/{camera.prefix}flow.publisher.{policy}": value
        for camera in cameras
        for policy, value in flow.items()
    }


def read_log(path: Path) -> dict[int, int]:
    """What a camera published on one topic: when it went out (`time.monotonic_ns`), by stamp in ns."""
    return dict(json.loads(line) for line in path.read_text().splitlines())


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run and judge. Raises `ChildError`, and `MediaError` for an unusable input."""
    cameras = cameras_of(options)
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        logs = Path(folder)
        live_run.prepare_environment(ROOT / "config" / "fastdds.xml", logs)
        os.environ["PYTHONPATH"] = os.pathsep.join([*PLACES, os.environ.get("PYTHONPATH", "")])
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        try:
            with Children(logs) as children:
                run = Run(options, cameras, children)
                run(logs)
        finally:
            rclpy.try_shutdown()
    warm_up_s = min(options.warm_up_s, 20.0 * options.minutes)  # of a short run a third
    result: dict[str, Any] = {
        "options": vars(options),
        "machine": {"processor": processor(), "cores": len(os.sched_getaffinity(0)), **versions()},
        "cameras": {
            camera.label: {"accounts": accounts(camera), "timing": timing(camera, warm_up_s)} for camera in cameras
        },
        "beside_the_misbehaving": beside_the_misbehaving(cameras),
        "relay_ms": run.relay.timing(warm_up_s) if run.relay is not None else {},
        "memory": memory_of(run.memory, warm_up_s),
    }
    result["bounds"] = bounds(options, result)
    return result


def processor() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="soak_flow_node", description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="bag, video or folder of images that the cameras show")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=30.0, help="of the first camera, Hz (default 30)")
    parser.add_argument(
        "--size", type=image_size, default=(640, 480), help="of the first camera, WIDTHxHEIGHT (default 640x480)"
    )
    parser.add_argument("--budget-ms", type=float, default=150.0, help="latency_budget_ms, 0 = none (default 150)")
    parser.add_argument("--max-iterations", type=int, default=6)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--misbehave", action="store_true", help="the last of several cameras does all that is wrong")
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME:=VALUE", help="another parameter")
    parser.add_argument("--reliable", action="store_true", help="images and flow by deep and reliable queues")
    parser.add_argument("--warm-up-s", type=float, default=30.0, help="not judged; at most a third of the run")
    parser.add_argument("--busy-neighbour", action="store_true", help="another process keeps one core busy")
    parser.add_argument("--overhead", action="store_true", help="1 minute at 5 Hz, one iteration, low scale, no budget")
    parser.add_argument("--accounts-only", action="store_true", help="judge no times and no memory")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    options = parser.parse_args(args)
    if options.misbehave and options.cameras < 2:
        parser.error("--misbehave needs --cameras 2 or more: another one to look at")
    if options.overhead and options.cameras > 1:
        parser.error(f"--overhead looks at one camera, got --cameras {options.cameras}")
    if options.overhead:
        options.minutes, options.rate, options.max_iterations, options.budget_ms = 1.0, 5.0, 1, 0.0
        # The estimator must be done before the next image comes, or images wait for it. What the node does beside it is
        # at the size of the image, whatever the scale that it computes at.
        options.parameter = ["min_scale:=0.25", "max_scale:=0.25", *options.parameter]
    return options


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_options(sys.argv[1:] if args is None else args)
    keep_freed_memory()  # else each flow field costs this process 5 ms of page faults before it counts as come
    try:
        result = soak(options)
    except (ChildError, MediaError, OSError) as error:
        print(f"soak_flow_node: {error}", file=sys.stderr)
        return 2
    show(result, Console())
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
    broken = [line["bound"] for line in result["bounds"] if not line["holds"]]
    print(f"FAIL {'; '.join(broken)}" if broken else f"PASS {len(result['bounds'])} bounds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
