# SPDX-License-Identifier: Apache-2.0
"""``point_tracks``: points followed from image to image, from the flow of ``flow_node`` and the images themselves."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import Header

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.perception.point_tracks import GAP, RESTART, SIZE, PointTracker, TrackSettings
from deq_flow_ros.ros.messages import image_to_rgb, make_cloud, ns_to_stamp
from deq_flow_ros.ros.perception import OK, WARN, FlowField, Verdict
from deq_flow_ros.ros.perception.flow_consumer import ConsumerSettings, FlowConsumer, main_of

HELD_IMAGES = 40
"""Images kept until their flow comes: more than a second at 30 Hz."""
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
        self._tracker = PointTracker()
        self._ended: Counter[str] = Counter()
        self._images: dict[int, Image] = {}
        self._images_lock = threading.Lock()
        self._greys: dict[int, np.ndarray] = {}  # of the last field, whose later image is the earlier one of the next
        outputs, inputs = {"tracks": PointCloud2}, {"image": (Image, self._on_image)}
        # Each field counts: one that is lost ends all tracks.
        super().__init__("point_tracks", TrackNodeSettings, outputs, inputs, held=10)

    def _on_image(self, message: Image) -> None:
        with self._images_lock:
            self._images[stamp_to_ns(message.header.stamp)] = message
            while len(self._images) > HELD_IMAGES:
                del self._images[next(iter(self._images))]

    def _grey(self, stamp_ns: int) -> np.ndarray:
        if stamp_ns in self._greys:
            return self._greys[stamp_ns]
        with self._images_lock:
            message, held = self._images.get(stamp_ns), len(self._images)
        if message is None:
            topic = self.resolve_topic_name("image")
            raise ValueError(
                f"none of the {held} images that wait on {topic} has the stamp {stamp_ns} ns of the flow: remap image "
                "to the topic that flow_node subscribes to, or ask flow_node for fewer iterations"
            )
        return cv2.cvtColor(image_to_rgb(message), cv2.COLOR_RGB2GRAY)

    def process(self, given: FlowField) -> Verdict:
        self._tracker.settings = self.settings
        stamps_ns = min(given.stamps_ns), max(given.stamps_ns)
        first, second = (self._grey(stamp_ns) for stamp_ns in stamps_ns)
        self._greys = {stamps_ns[0]: first, stamps_ns[1]: second}
        with self._images_lock:  # those up to the later one are not needed any more
            while stamps_ns[1] in self._images:
                del self._images[next(iter(self._images))]
        backward = given.stamps_ns != stamps_ns
        ended = self._tracker.follow(given.flow, given.uncertainty, first, second, stamps_ns, backward)
        self._ended += ended
        tracks = self._tracker.tracks
        header = Header(stamp=ns_to_stamp(stamps_ns[1]), frame_id=given.header.frame_id)
        self.publish("tracks", lambda: cloud_of(header, tracks))
        age = np.median(tracks["age"]) if len(tracks) else 0
        values = {"tracks": str(len(tracks)), "median_age": f"{age:.0f}"}
        values |= {f"ended: {reason}": str(count) for reason, count in sorted(self._ended.items())}
        for reason in (GAP, RESTART, SIZE):
            if ended[reason]:
                return Verdict(f"all {ended[reason]} tracks ended: {reason}", WARN, values)
        if not len(tracks):
            return Verdict("no tracks: too little texture in the image, see min_texture", WARN, values)
        return Verdict(f"{len(tracks)} tracks, of which half are {age:.0f} images old or older", OK, values)


def cloud_of(header: Header, tracks: np.ndarray) -> PointCloud2:
    """The tracks (N,) of ``TRACK`` in ``COLUMNS``, one point for each."""
    table = np.empty(len(tracks), list(COLUMNS.items()))
    table["x"], table["y"] = tracks["point"].T
    table["id"], table["age"], table["confidence"] = tracks["id"], tracks["age"], 1 / (1 + tracks["error"])
    cloud = make_cloud(header, table)
    cloud.is_dense = True
    return cloud


main = main_of(PointTracksNode, "point_tracks", __doc__)

if __name__ == "__main__":
    sys.exit(main())
