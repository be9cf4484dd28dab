# SPDX-License-Identifier: Apache-2.0
"""Runs `flow_node` for minutes and holds it to its promises; not collected by pytest.

    python test/soak_flow_node.py --input VIDEO --minutes 5 --rate 30 --size 640x480 --budget-ms 150
    python test/soak_flow_node.py --input VIDEO --minutes 2 --cameras 2 --misbehave
    python test/soak_flow_node.py --input VIDEO --hours 3 --faults 1
    python test/soak_flow_node.py --input VIDEO --overhead      # what the node costs beside its estimator

Node and cameras are processes of their own over DDS. Checked: exactly one account per image published, each flow field
against its account, the node's memory once a second, and late fields. With --cameras 2 the second camera has half the
size and two thirds of the rate; with --misbehave the last one floods, falls silent, changes size and loops its clock,
and the others must not suffer. With --faults something goes wrong every 20 s (soak_faults.py) after every processing
scale was there once, and flow must come again within 1 s. With --overhead: the time from an image's going out to its
flow's coming in, less that of the estimator, and in the same run that of a node which computes nothing (`relay`).

The last line is "PASS" or "FAIL", with the bounds that are broken. Exit status: 0 all bounds hold, 1 one is broken, 2
unusable input or a process failed."""

from __future__ import annotations

import argparse
import itertools
import json
import os
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
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from rich.console import Console
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger

ROOT = Path(__file__).parent.parent
# Neither this process nor its children may depend on whether, or which, package is installed.
PLACES = [str(ROOT), str(ROOT / "test")]
sys.path[:0] = PLACES

from soak_faults import Injector, read_logs, recoveries, schedule
from soak_options import parse_options
from soak_parts import RELAY_INPUT, RELAY_OUTPUT, half
from soak_report import Camera, Relay, accounts, beside_the_misbehaving, bounds, memory_of, show, timing

from deq_flow_ros.host import ChildError, Children, keep_freed_memory, machine, versions
from deq_flow_ros.live import run as live_run
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.bags import report_of

READY_S, QUIET_S = 120.0, 3.0
RELIABLE_DEPTH = 100


def cameras_of(options: argparse.Namespace) -> list[Camera]:
    """One camera without a name, or several with names, every other one smaller and slower."""
    if options.cameras == 1:
        return [Camera("", options.size, options.rate, faulty=options.faults is not None)]
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
        self.memory: list[tuple[int, float]] = []  # (`time.monotonic_ns`, MB)
        self.over: list[tuple[str, int]] = []  # kind and end (`time.monotonic_ns`) of each fault
        self.snapshots: list[Future] = []
        self._scales: list[Future] = []
        self._injector: Injector | None = None
        self._processes: dict[str, str] = {}
        """The child that is a camera now, by the camera's label."""
        self._numbers = itertools.count()
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
            "snapshot_folder": str(logs / "snapshots"),
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
            self._start_camera(camera, seconds, logs)
        if options.faults is not None:
            self._injector = self._prepare_faults(seconds, logs)
        self._until(self._cameras_ended, seconds + READY_S, "kept its cameras waiting")
        children.check()
        if self.relay is not None:
            self.relay.published_ns, _ = read_logs([logs / "relay.jsonl"])
        self._read_camera_logs(logs)
        self._drain()
        for answer in self._scales:
            if not answer.result().result.successful:
                raise self._children.failure("flow_node", f"kept its scale: {answer.result().result.reason}")
        self.over = self._read_camera_logs(logs) + (self._injector.over if self._injector is not None else [])
        children.stop("flow_node", 20.0)
        self._node.destroy_node()

    def _read_camera_logs(self, logs: Path) -> list[tuple[str, int]]:
        """Tell the cameras what they published; returns the faults that they made."""
        faults = []
        for camera in self._cameras:
            paths = [logs / f"{camera.label}.{number}.jsonl" for number in range(next(self._numbers))]
            reported = {report.stamp_ns for report in camera.reports}
            camera.published_ns, over = read_logs([path for path in paths if path.exists()], reported)
            faults += over
        return faults

    def _start_camera(self, camera: Camera, seconds: float, logs: Path, begin_s: float = 0.0) -> None:
        name = f"{camera.label}.{next(self._numbers)}"
        words = ["camera", "--name", camera.label, "--topic", camera.input, "--input", self._options.input]
        words += ["--size", "{}x{}".format(*camera.size), "--rate", str(camera.rate), "--seconds", str(seconds)]
        words += ["--log", str(logs / f"{name}.jsonl")]
        if camera.misbehaves:
            words.append("--misbehave")
        if self._options.faults is not None:
            words += ["--faults", str(self._options.faults), "--begin-s", str(begin_s)]
        if self.relay is not None:
            words += ["--topic", RELAY_INPUT, "--log", str(logs / "relay.jsonl")]
        self._children.start(name, "soak_parts", words)
        self._processes[camera.label] = name

    def _prepare_faults(self, seconds: float, logs: Path) -> Injector:
        """A subscriber to be stopped, and who makes the faults."""
        (camera,) = self._cameras
        self._children.start("listener", "soak_parts", ["listener", "--topic", f"/flow_node/{camera.prefix}flow"])
        snapshot = self._node.create_client(Trigger, "/flow_node/snapshot")
        client = AsyncParameterClient(self._node, "flow_node")
        return Injector(
            schedule(self._options.faults, seconds),
            self._children,
            lambda begin_s: self._start_camera(camera, seconds, logs, begin_s),
            lambda: self._processes[camera.label],
            lambda: self.snapshots.append(snapshot.call_async(Trigger.Request())),
            lambda scale: self._scales.append(client.set_parameters_atomically(scales(scale))),
        )

    def _connected(self) -> bool:
        topics = [f"/flow_node/{camera.prefix}{name}" for camera in self._cameras for name in ("statistics", "flow")]
        return all(self._node.count_publishers(topic) for topic in topics) and all(
            self._node.count_subscribers(camera.input) for camera in self._cameras
        )

    def _cameras_ended(self) -> bool:
        now_s = time.monotonic()
        if now_s >= self._next_sample_s:
            self._next_sample_s = now_s + 1.0
            pages = int(Path(f"/proc/{self._children.processes['flow_node'].pid}/statm").read_text().split()[1])
            self.memory.append((time.monotonic_ns(), pages * os.sysconf("SC_PAGESIZE") / 1e6))
        if self._injector is not None:
            self._injector.step()
            if self._injector.camera_away:
                return False
        return not any(self._children.processes[name].poll() is None for name in self._processes.values())

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


def scales(scale: float | None) -> list[Parameter]:
    """Parameters of a node that computes at this scale alone, or by its budget (None)."""
    return [Parameter("min_scale", value=scale or 0.25), Parameter("max_scale", value=scale or 1.0)]


def reliable_parameters(cameras: list[Camera]) -> dict[str, object]:
    """Of a node that loses no image and no flow on the way, however long a process waits for the processor."""
    flow = {"reliability": "reliable", "depth": RELIABLE_DEPTH}
    return {"qos_reliability": "reliable", "qos_depth": RELIABLE_DEPTH} | {
        f"qos_overrides./flow_node/{camera.prefix}flow.publisher.{policy}": value
        for camera in cameras
        for policy, value in flow.items()
    }


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
        "machine": {"processor": machine(), **versions()},
        "cameras": {
            camera.label: {"accounts": accounts(camera), "timing": timing(camera, warm_up_s)} for camera in cameras
        },
        "beside_the_misbehaving": beside_the_misbehaving(cameras),
        "relay_ms": run.relay.timing(warm_up_s) if run.relay is not None else {},
        "memory": memory_of(run.memory, warm_up_s),
        "recovery_s": recoveries(run.over, cameras[0].published_ns, cameras[0].flow_ns),
        "snapshots": {
            "asked": len(run.snapshots),
            "refused": sum(not future.result().success for future in run.snapshots if future.done()),
        },
    }
    result["bounds"] = bounds(options, result)
    return result


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
