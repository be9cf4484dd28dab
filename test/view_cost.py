# SPDX-License-Identifier: Apache-2.0
"""What the page of ``flow_view`` costs: processor time of its process, and what becomes of the flow node's frames.

    python test/view_cost.py --input VIDEO

A camera sends 640x480 at 15 Hz to ``flow_node``, one subscriber takes the flow, and browsers (here threads that ask as
the page does) come and go. Beside the accounts of the frames, the table has the processor time of node and view.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

from deq_flow_ros.command_line import CommandLine
from deq_flow_ros.host import Children

RATE_HZ = 15.0
TOPIC = "/view_cost/image_raw"
with socket.create_server(("127.0.0.1", 0)) as _free:
    PORT = _free.getsockname()[1]
PHASES = (("no view", -1), ("nobody looks", 0), ("one looks", 1), ("three look", 3), ("nobody looks any more", 0))
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def processor_s(pid: int) -> float:
    """User and system time of a process."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) * TICK_S


def browse(stop: threading.Event, seen: Counter[str]) -> None:
    """Ask as the page does, one question after the other, until told to stop."""
    connection, after = http.client.HTTPConnection("127.0.0.1", PORT, timeout=10), 0
    while not stop.is_set():
        connection.request("GET", f"/live?after={after}&pictures=image,flow,residual")
        body = connection.getresponse().read()
        after = int(body.partition(b'"number": ')[2].partition(b",")[0])
        seen.update(answers=1, bytes=len(body), pictures=body.count(b'"src"'))
    connection.close()


def start_view(children: Children, parameters: Sequence[str]) -> None:
    """``flow_view``; returns when it answers."""
    words = [word for parameter in (f"port:={PORT}", *parameters) for word in ("-p", parameter)]
    children.start("view", "deq_flow_ros.ros.view.flow_view", ["--ros-args", *words])
    for _ in range(300):
        time.sleep(0.1)
        children.check()
        if "the page is at" in children.log("view").read_text():
            return
    raise children.failure("view", "serves no page")


def measure(options: argparse.Namespace, children: Children, accounts: list[dict[str, str]]) -> None:
    """Print a row for each phase."""
    columns = ("", "view [%]", "node [%]", "images", "with flow", "superseded", "lost", "late", "publish [ms]")
    columns += ("pictures/s", "kB/s")
    print(*columns, sep=" | ")
    print(*["---", *["---:"] * (len(columns) - 1)], sep=" | ")
    for name, browsers in PHASES:
        if browsers == 0 and not children.log("view").exists():
            start_view(children, options.parameter)
        stop, seen = threading.Event(), Counter[str]()
        threads = [threading.Thread(target=browse, args=(stop, seen)) for _ in range(max(0, browsers))]
        for thread in threads:
            thread.start()
        time.sleep(6.0)  # subscriptions come and go
        seen.clear()
        first, began_s = len(accounts), time.monotonic()
        names = ["view"] * (browsers >= 0) + ["node"]
        before = {child: processor_s(children.processes[child].pid) for child in names}
        time.sleep(options.seconds)
        took_s = time.monotonic() - began_s
        share = {child: 100 * (processor_s(children.processes[child].pid) - s) / took_s for child, s in before.items()}
        phase, rates = accounts[first:], {key: count / took_s for key, count in seen.items()}
        stop.set()
        for thread in threads:
            thread.join()
        flows = [account for account in phase if account["outcome"] == "processed"]
        superseded = sum("superseded" in account["reason"] for account in phase)
        lost = int(phase[-1]["frames_lost"]) - int(phase[0]["frames_lost"])
        late = sum(account["over_budget"] == "true" for account in flows)
        costs = f"{share.get('view', 0.0):.1f}", f"{share['node']:.0f}"
        publish_ms = f"{statistics.median(float(flow['stage_publish_ms']) for flow in flows):.1f}"
        fetched = f"{rates.get('pictures', 0.0):.1f}", f"{rates.get('bytes', 0.0) / 1e3:.0f}"
        print(name, *costs, len(phase), len(flows), superseded, lost, late, publish_ms, *fetched, sep=" | ", flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    line = CommandLine("python test/view_cost.py", __doc__)
    line.add_argument("--input", required=True, help="video, bag or folder of images")
    line.add_number("--seconds", 20.0, "length of a phase", above=0)
    line.add_number("--budget-ms", 50.0, "latency budget of the node; below the 67 ms between two images", above=0)
    line.add_argument("--parameter", nargs="*", default=[], metavar="NAME:=VALUE", help="of flow_view")
    options = line.parse_args(args)
    places = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)  # of the camera and the listener, which are parts of the tests
    rclpy.init()
    node, accounts = rclpy.create_node("view_cost"), list[dict[str, str]]()

    def take(message: DiagnosticArray) -> None:
        accounts.append({pair.key: pair.value for pair in message.status[0].values})

    node.create_subscription(DiagnosticArray, "/flow_node/statistics", take, 100)
    executor = SingleThreadedExecutor()
    executor.add_node(node)

    def spin() -> None:
        with suppress(ExternalShutdownException):
            executor.spin()

    spinning = threading.Thread(target=spin, daemon=True)
    spinning.start()
    with tempfile.TemporaryDirectory() as folder, Children(Path(folder)) as children:
        values = {"latency_budget_ms": options.budget_ms, "threads": 1}
        parameters = [word for name, value in values.items() for word in ("-p", f"{name}:={value}")]
        parameters += ["-r", f"~/image:={TOPIC}"]
        children.start("node", "deq_flow_ros.ros.flow_node", ["--ros-args", *parameters])
        listener = ["listener", "--topic", "/flow_node/flow"]
        children.start("listener", "soak_parts", listener)
        seconds = 2.0 * len(PHASES) * (options.seconds + 30.0)
        camera = ["--name", "camera", "--topic", TOPIC, "--input", options.input, "--size", "640x480"]
        camera += ["--rate", str(RATE_HZ), "--seconds", str(seconds), "--log", str(Path(folder) / "camera.jsonl")]
        children.start("camera", "soak_parts", ["camera", *camera])
        while not any(account["outcome"] == "processed" for account in accounts):
            children.check()
            time.sleep(0.1)
        time.sleep(5.0)  # the node learns its costs
        measure(options, children, accounts)
        children.check()
    executor.shutdown()
    spinning.join()
    rclpy.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
