# SPDX-License-Identifier: Apache-2.0
"""``time_to_contact``: in how many seconds the camera meets what it sees, from the flow of ``flow_node``."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
from sensor_msgs.msg import Image
from std_msgs.msg import Float32

from deq_flow_ros.perception.time_to_contact import ContactEstimator, ContactSettings
from deq_flow_ros.ros.messages import array_to_image
from deq_flow_ros.ros.perception import OK, REPEATED, WARN, FlowField, Verdict
from deq_flow_ros.ros.perception.flow_consumer import ConsumerSettings, FlowConsumer, main_of


@dataclass(frozen=True)
class ContactNodeSettings(ConsumerSettings, ContactSettings):
    """The parameters of ``time_to_contact``."""


class TimeToContactNode(FlowConsumer[ContactNodeSettings]):
    """Publishes ``~/seconds``, ``~/confidence`` and ``~/first``."""

    def __init__(self) -> None:
        outputs = {"seconds": Image, "confidence": Image, "first": Float32}
        super().__init__("time_to_contact", ContactNodeSettings, outputs)
        self._estimator: ContactEstimator | None = None
        self._until_ns: int | None = None

    def process(self, given: FlowField) -> Verdict:
        if given.camera is None:
            return Verdict(f"no times, because {given.camera_problem}", WARN)
        shape, estimator = (given.uncertainty.shape[0], given.uncertainty.shape[1]), self._estimator
        wanted = shape, given.camera, self.settings
        if estimator is None or (estimator.shape, estimator.camera, estimator.settings) != wanted:
            self._estimator = estimator = ContactEstimator(*wanted)
        follows = min(given.stamps_ns) == self._until_ns
        if not follows:
            estimator.forget()
        self._until_ns = max(given.stamps_ns)
        if given.repeated:
            raise ValueError(REPEATED)  # or everything would seem to stand still
        found = estimator(given.flow, given.uncertainty, (given.stamps_ns[1] - given.stamps_ns[0]) * 1e-9)
        self.publish("seconds", lambda: array_to_image(found.seconds, "32FC1", given.header))
        self.publish("confidence", lambda: array_to_image(found.confidence, "32FC1", given.header))
        self.publish("first", lambda: Float32(data=found.first))
        told = found.confidence > 0
        values = {"first_s": f"{found.first:.2f}", "regions_known": f"{told.mean():.3f}"}
        values["regions_approaching"] = f"{(told & np.isfinite(found.seconds)).mean():.3f}"
        values["continues"] = "true" if follows else "false"
        if math.isnan(found.first):
            why = "too little texture, too slow a motion between two images, or regions with more than one surface"
            return Verdict(f"no region has a time that is to be trusted: {why}", WARN, values)
        words = "nothing approaches" if math.isinf(found.first) else f"the first contact is in {found.first:.1f} s"
        words += f"; {told.mean():.0%} of the regions are known"
        if not found.rotation_known:
            words += "; the rotation of the camera is not, so that slanted surfaces are wrong"
        return Verdict(words, OK if found.rotation_known else WARN, values)


main = main_of(TimeToContactNode, "time_to_contact", __doc__)

if __name__ == "__main__":
    sys.exit(main())
