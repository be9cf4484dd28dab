# SPDX-License-Identifier: Apache-2.0
"""``point_tracks``: points followed from image to image, from the flow of ``flow_node`` and the images themselves."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import Header

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.perception.point_tracks import GAP, RESTART, SIZE, PointTracker, Tracks, TrackSettings
from deq_flow_ros.ros.messages import image_to_rgb, make_cloud, ns_to_stamp
from deq_flow_ros.ros.perception.fields import OK, WARN, Verdict
from deq_flow_ros.ros.perception.flow_consumer import ConsumerSettings, FlowConsumer, FlowField, Input
from deq_flow_ros.ros.process import run

USAGE = """Points followed from image to image, from the flow of flow_node and the images themselves:

  ros2 run deq_flow_ros point_tracks --ros-args -r image:=/camera/image_raw -r flow_node/flow:=FLOW \\
      -r flow_node/uncertainty:=UNCERTAINTY -r flow_node/statistics:=STATISTICS

docs/point_tracks.md describes its topics and parameters."""
HELD_IMAGES = 40
"""Images kept until their flow comes: more than a second at 30 Hz."""
WAITING_IMAGES = 10
"""Images that the middleware may hold, at least."""
COLUMNS = {"x": "f4", "y": "f4", "id": "u4", "age": "u4", "confidence": "f4"}
"""Of the points of ``~/tracks``, each of 4 bytes."""


@dataclass(frozen=True)
class TrackNodeSettings(ConsumerSettings, TrackSettings):
    """The parameters of ``point_tracks``."""

    def check(self) -> None:
        if self.window_px % 2 == 0:
            raise ValueError(f"window_px: expected an odd number, got {self.window_px}")


class PointTracksNode(FlowConsumer[TrackNodeSettings]):
    """Publishes ``~/tracks``."""

    def __init__(self) -> None:
        # Each field counts: one that is lost ends all tracks.
        super().__init__("point_tracks", TrackNodeSettings, {"tracks": PointCloud2}, held=10)
        self._tracker = PointTracker()
        self._ended: Counter[str] = Counter()
        self._restarted = threading.Event()
        self._images: dict[int, Image | np.ndarray] = {}
        self._images_lock = threading.Lock()
        self._image_topic = self.resolve_topic_name("image")

    def on_restart(self) -> None:
        self._restarted.set()
        with self._images_lock:
            self._images.clear()

    def more_inputs(self) -> Mapping[str, Input]:
        return {"image": (Image, self._on_image, WAITING_IMAGES)}

    def _on_image(self, message: Image) -> None:
        with self._images_lock:
            self._images[stamp_to_ns(message.header.stamp)] = message
            while len(self._images) > HELD_IMAGES:
                del self._images[next(iter(self._images))]

    def _grey(self, stamp_ns: int) -> np.ndarray:
        with self._images_lock:
            message = self._images.get(stamp_ns)
            held = len(self._images)
        if message is None:
            raise ValueError(
                f"none of the last {held} images on {self._image_topic} has the stamp {stamp_ns} ns of the flow: remap "
                "image to the topic that flow_node subscribes to, or ask flow_node for fewer iterations"
            )
        if isinstance(message, np.ndarray):
            return message
        grey = cv2.cvtColor(image_to_rgb(message), cv2.COLOR_RGB2GRAY)
        with self._images_lock:
            if stamp_ns in self._images:  # each image is asked for twice: as the later one, and as the earlier
                self._images[stamp_ns] = grey
        return grey

    def process(self, given: FlowField) -> Verdict:
        self._tracker.settings = self.settings
        first_ns, second_ns = stamps_ns = min(given.stamps_ns), max(given.stamps_ns)
        ended: Counter[str] = Counter()
        if self._restarted.is_set():
            self._restarted.clear()
            ended += self._tracker.restart()
        images, backward = (self._grey(first_ns), self._grey(second_ns)), given.stamps_ns != stamps_ns
        ended += self._tracker.follow(given.flow, given.uncertainty, *images, stamps_ns, backward)
        with self._images_lock:  # those that came before the later image are not needed any more
            while second_ns in self._images and next(iter(self._images)) != second_ns:
                del self._images[next(iter(self._images))]
        self._ended += ended
        header = Header(stamp=ns_to_stamp(second_ns), frame_id=given.header.frame_id)
        self.publish("tracks", cloud_of(header, self._tracker.tracks))
        return self._verdict(ended)

    def _verdict(self, ended: Counter[str]) -> Verdict:
        ages = self._tracker.tracks.ages
        values = {"tracks": str(len(ages)), "median_age": f"{np.median(ages) if len(ages) else 0:.0f}"}
        values |= {f"ended: {reason}": str(count) for reason, count in sorted(self._ended.items())}
        for reason in (GAP, RESTART, SIZE):
            if ended[reason]:
                return Verdict(f"all {ended[reason]} tracks ended: {reason}", WARN, values)
        if not len(ages):
            return Verdict("no tracks: too little texture in the image, see min_texture", WARN, values)
        return Verdict(f"{len(ages)} tracks, of which half are {np.median(ages):.0f} images old or older", OK, values)


def cloud_of(header: Header, tracks: Tracks) -> PointCloud2:
    """The tracks in ``COLUMNS``, one point for each."""
    table = np.empty(len(tracks.ids), list(COLUMNS.items()))
    table["x"], table["y"] = tracks.points.T
    table["id"], table["age"], table["confidence"] = tracks.ids, tracks.ages, tracks.confidence
    cloud = make_cloud(header, table)
    cloud.is_dense = True
    return cloud


main = partial(run, PointTracksNode, "point_tracks", USAGE)
"""Runs the process; see ``run``."""

if __name__ == "__main__":
    sys.exit(main())
