# SPDX-License-Identifier: Apache-2.0
"""What a subscriber that reads slowly, or not at all, costs who publishes the flow: time and memory of ``publish``.

    python test/stopped_subscriber.py

Fields of 640x480 go out at 15 Hz as the node publishes them, to one subscriber in a process of its own; the last row,
to compare with, is the sensor-data profile on both sides.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.publisher import Publisher
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from deq_flow_ros.ros import qos
from deq_flow_ros.ros.messages import array_to_image

TOPIC = "/stopped_subscriber/flow"
RATE_HZ = 15.0
STOPPED = "stopped (SIGSTOP)"
BEST_EFFORT = "both best effort"
SUBSCRIBERS = {
    "none": None, "reads at once": 0.0, "takes 1 s for each": 1.0, STOPPED: 0.0, f"{STOPPED}, {BEST_EFFORT}": 0.0,
}  # fmt: skip
"""Seconds that a subscriber takes for each field."""
READ = """
import sys, time, rclpy
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
rclpy.init()
node = Node("reader")
profile = qos_profile_sensor_data if sys.argv[3] == "best effort" else 10
node.create_subscription(Image, sys.argv[1], lambda message: time.sleep(float(sys.argv[2])), profile)
rclpy.spin(node)
"""


def publish(publisher: Publisher, seconds: float) -> np.ndarray:
    """Publish for so long; returns how long each call took, in ms."""
    message = array_to_image(np.zeros((480, 640, 2), np.float32), "32FC2", Header(frame_id="camera"))
    took_ms = []
    for _ in range(round(seconds * RATE_HZ)):
        begun_s = time.perf_counter()
        publisher.publish(message)
        took_ms.append(1e3 * (time.perf_counter() - begun_s))
        time.sleep(max(0.0, 1 / RATE_HZ - 1e-3 * took_ms[-1]))
    return np.array(took_ms)


def resident_mb() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(node: Node, name: str, seconds: float) -> list[float]:
    """The figures of a row: of the times of ``publish``, of the processor's time, of the memory."""
    best_effort = BEST_EFFORT in name
    publisher = node.create_publisher(Image, TOPIC, qos.sensor_data() if best_effort else qos.output())
    delay_s, reader = SUBSCRIBERS[name], None
    if delay_s is not None:
        kind = "best effort" if best_effort else "reliable"
        reader = subprocess.Popen([sys.executable, "-c", READ, TOPIC, str(delay_s), kind])
    try:
        while reader is not None and not publisher.get_subscription_count():
            time.sleep(0.05)
        publish(publisher, 1.0)
        if reader is not None and STOPPED in name:
            reader.send_signal(signal.SIGSTOP)
        before_mb, before_s = resident_mb(), time.process_time()
        took_ms = publish(publisher, seconds)
        processor_ms = 1e3 * (time.process_time() - before_s) / len(took_ms)
        return [*np.percentile(took_ms, (50, 99)), took_ms.max(), processor_ms, resident_mb() - before_mb]
    finally:
        if reader is not None:
            reader.kill()
            reader.wait()
        node.destroy_publisher(publisher)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each kind of subscriber."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="with each subscriber (default 20)")
    options = parser.parse_args(arguments)
    rclpy.init()
    node = Node("stopped_subscriber")
    columns = ("publish, median [ms]", "99 %", "longest", "processor [ms]", "memory [MB]")
    print(f"| subscriber | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for name in SUBSCRIBERS:
        figures = measure(node, name, options.seconds)
        print(f"| {name} | {' | '.join(f'{figure:.1f}' for figure in figures)} |", flush=True)
    rclpy.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
