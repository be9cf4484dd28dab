# SPDX-License-Identifier: Apache-2.0
"""The parameters of ``flow_node``: one table, from which they are declared and read, and what a change must be like."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from deq_flow_ros.imaging.encodings import Levels
from deq_flow_ros.model import PRECISIONS
from deq_flow_ros.ros.parameter_table import ParameterTable
from deq_flow_ros.settings import at_start, configured, live, number, one_of
from deq_flow_ros.streaming import RUNTIMES


@dataclasses.dataclass(frozen=True)
class NodeSettings(ParameterTable):
    """Values of all parameters. ``config/flow.yaml`` lists them with the same defaults."""

    cameras: tuple[str, ...] = configured(
        ("",), "names of the cameras, which share one model. The topics of NAME are below ~/NAME/ (~/NAME/image, "
        '~/NAME/flow and so on). With the only name "", there is one camera, whose topics are directly below the node',
    )  # fmt: skip
    model: str = configured("nano", "name of a model that ships with the package, or path of a weights file")
    device: str = configured("cpu", "device to compute on: cpu, cuda or cuda:N. A missing device is an error")
    precision: str = configured(
        one_of(*PRECISIONS), "type of weights and features. auto is float16 on CUDA, bfloat16 on a CPU with "
        "instructions for it (AVX512-BF16, AMX), and float32 elsewhere. int8 is auto with an encoder of int8, on a CPU "
        "with VNNI. The flow itself is always float32",
    )  # fmt: skip
    gpu_runtime: str = configured(
        one_of(*RUNTIMES),
        "what computes on CUDA: eager, graphs, or graphs of compiled code. auto = the fastest of these",
    )
    threads: int = configured(
        number(0, 0, 256), "threads to compute with on the CPU. 0 = all cores but one, which is for the middleware"
    )

    latency_budget_ms: float = live(
        number(90.0, 0.0, 60000.0, "ms"), "latency budget: time from the arrival of an image to its flow. 0 = no budget"
    )
    latency_from: str = live(
        one_of("arrival", "stamp"), "when the budget starts to count. arrival = when this machine's middleware "
        "receives the image; stamp = at the stamp of the image, by the ROS clock, so that the delay of the camera "
        "counts as well (a stamp that is not 0 to 10 s old is ignored)",
    )  # fmt: skip
    max_iterations: int = live(
        number(6, 1, 200),
        "largest number of iterations of the solver per pair of images. A cold start (without a previous pair) makes "
        "up to 4 more at each of two smaller resolutions first, or of more if max_scale enlarges the image",
    )
    tolerance_px: float = live(
        number(0.1, 0.0, 10.0, "px"), "the solver stops when the RMS change of the flow is at most this. 0 = only "
        "max_iterations and the budget stop it",
    )  # fmt: skip
    direction: str = live(
        one_of("forward", "backward"), "forward = flow from the previous image to the current one, on the pixels and "
        "with the header of the previous image; backward = from the current image to the previous one, on the pixels "
        "and with the header of the current image",
    )  # fmt: skip
    min_scale: float = live(
        number(0.25, 0.0625, 4.0), "smallest scale of the images to compute at if time is short. Whatever this allows, "
        "images are not made smaller than 96 px on their short side",
    )  # fmt: skip
    max_scale: float = live(
        number(1.0, 0.0625, 4.0),
        "largest scale of the images to compute at. Above 1, images are enlarged, for finer flow at more cost. "
        "Whatever this allows, no image is computed at more than 4,194,304 pixels, or 1,048,576 by a model with GMA",
    )
    refinement: int = live(
        number(0, 0, 20),
        "steps of a refinement of the flow at the resolution of the image, on the CPU. 0 = no refinement",
    )
    max_gap_ms: float = live(
        number(1000.0, 1.0, 3600000.0, "ms"),
        "if the time between two images is longer than this, the stream starts anew",
    )
    warm_up_width: int = configured(
        number(640, 0, 8192, "px"),
        "image width for which configure measures the costs. 0 = learn them from the first images",
    )
    warm_up_height: int = configured(
        number(480, 0, 8192, "px"),
        "image height for which configure measures the costs. 0 = learn them from the first images",
    )

    image_transport: str = configured(
        one_of("auto", "raw", "compressed", "video"), "raw = the image topic; compressed = IMAGE/compressed beside it; "
        "video = H.264 or H.265 on IMAGE/ffmpeg or IMAGE/foxglove; auto = the one that is published, in this order. "
        "All but raw also read such messages on the image topic itself",
    )  # fmt: skip
    qos_reliability: str = configured(
        one_of("best_effort", "reliable"),
        "reliability that is requested from the image publisher. best_effort receives from any publisher; reliable "
        "loses no image in transport, but receives nothing from a best-effort publisher",
    )
    qos_depth: int = configured(
        number(5, 1, 1000, "images"), "images that the middleware may hold for the node. The node takes them at once "
        "and keeps only the newest. With 1, the middleware discards some images without an account",
    )  # fmt: skip
    max_rate_hz: float = live(
        number(0.0, 0.0, 1000.0, "Hz"),
        "largest number of images processed per second and camera. It must be above 1000 / max_gap_ms. 0 = every image",
    )
    silence_warning_s: float = live(
        number(5.0, 0.0, 3600.0, "s"), "time without an image after which the node warns and gives the reason, and "
        "warns again at doubling intervals. 0 = never",
    )  # fmt: skip

    roi: tuple[int, int, int, int] = live(
        (0, 0, 0, 0), "region of interest [x, y, width, height] in pixels of the image. Only this part is processed "
        "and published. Width and height are at least 16. All 0 = the whole image",
    )  # fmt: skip
    intensity_range: tuple[int, int] = live(
        (0, 0), "[black, white] of a 16-bit camera in counts of 0 to 65535, such as [7000, 9000] for a thermal camera. "
        "[0, 0] = the range that its images use, kept as long as they fit into it",
    )  # fmt: skip
    output_scale: float = live(
        number(1.0, 0.0625, 1.0), "size of the published fields relative to the image (or region). Lengths are in "
        "pixels of the published field, and camera_info is scaled accordingly",
    )  # fmt: skip
    units: str = live(
        one_of("px", "normalized_per_second"), "units of the published flow. px = displacement in pixels; "
        "normalized_per_second = velocity in normalized image coordinates (focal length 1), which needs camera_info",
    )  # fmt: skip
    points_stride: int = live(
        number(8, 1, 256, "px"),
        "distance between neighbouring points of ~/points, across and down, in the published flow",
    )
    color_max_px: float = live(
        number(0.0, 0.0, 10000.0, "px"),
        "length of the flow with full saturation in ~/flow_color. 0 = the largest of each field",
    )
    compressed_format: str = live(one_of("jpeg", "png"), "format of ~/flow_color/compressed")
    jpeg_quality: int = live(number(90, 1, 100), "JPEG quality of ~/flow_color/compressed")

    diagnostics_period_s: float = configured(number(1.0, 0.1, 3600.0, "s"), "time between two messages on /diagnostics")
    snapshot_folder: str = live(
        "", "folder in which the service ~/snapshot writes a new folder for each snapshot. Empty = flow_snapshots "
        "beside ROS's log files",
    )  # fmt: skip
    always_on: bool = live(
        False, "process images also while nobody subscribes to an output of their camera, so that the stream is warm "
        "for the first subscriber. false = these images are dropped, at no cost",
    )  # fmt: skip
    autostart: bool = at_start(True, "configure and activate at start. false = wait for a lifecycle manager")
    exit_on_failure: bool = at_start(
        False, "what happens if autostart cannot configure and activate the node. true = the process ends with status "
        "1; false = it stays, so that an operator can correct what its log names, and call the transitions",
    )  # fmt: skip

    def check(self) -> None:
        """See ``ParameterTable``."""
        size = (self.warm_up_width, self.warm_up_height)
        if size != (0, 0) and min(size) < 16:
            raise ValueError(f"expected warm_up_width and warm_up_height to be both 0 or both at least 16, got {size}")
        if self.min_scale > self.max_scale:
            raise ValueError(f"expected min_scale <= max_scale, got {self.min_scale:g} and {self.max_scale:g}")
        if 0.0 < self.max_rate_hz <= 1000.0 / self.max_gap_ms:  # jitter makes a gap of every second one that is equal
            raise ValueError(
                f"max_rate_hz {self.max_rate_hz:g} leaves {1000.0 / self.max_rate_hz:g} ms between images, which "
                f"max_gap_ms {self.max_gap_ms:g} takes for gaps, so that no flow would come: expected "
                "max_rate_hz above 1000 / max_gap_ms; raise one of them"
            )

    def compute_threads(self) -> int:
        """Number of threads that ``threads`` stands for."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) - 1)

    def levels(self) -> Levels:
        """Those of ``intensity_range``, for which two zeros stand for the range of the images themselves."""
        low, high = self.intensity_range
        return Levels((low, high) if high else None)

    def of_estimator(self) -> dict[str, Any]:
        """The settings of ``FlowEstimator``, for which "none" is None instead of 0."""
        names = ("max_iterations", "direction", "min_scale", "max_scale", "refinement", "max_gap_ms")
        limits = {name: getattr(self, name) or None for name in ("latency_budget_ms", "tolerance_px")}
        return {**limits, **{name: getattr(self, name) for name in names}}


LIVE = frozenset(field.name for field in dataclasses.fields(NodeSettings) if field.metadata["live"])
"""Names of the parameters that may change while the node is configured."""


def check_change(parameters: Sequence[Parameter], node: Node, configured: bool) -> SetParametersResult:
    """Answer to a request to set parameters: what ranges cannot express, and whether it would have any effect now."""
    names = NodeSettings.names()  # others are ROS's own, as use_sim_time
    ours = {parameter.name: parameter.value for parameter in parameters if parameter.name in names}
    try:
        NodeSettings.check_choices(ours)
        for name, value in ours.items():
            if name in _ARRAYS and not _ARRAYS[name][0](value):
                raise ValueError(f"{name}: expected {_ARRAYS[name][1]}, got {list(value)}")
            if configured and name not in LIVE:
                raise ValueError(f"{name} is read in configure: call the transitions deactivate and cleanup first")
        # Before configure, values that belong together may still come one by one: configure checks them.
        if configured and ours:
            NodeSettings.read(node, parameters)
    except ValueError as error:
        return SetParametersResult(successful=False, reason=str(error))
    return SetParametersResult(successful=True)


def _are_names(names: Sequence[str]) -> bool:
    named = bool(names) and all(re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) for name in names)
    return (named or list(names) == [""]) and len(set(names)) == len(names)


def _is_region(roi: Sequence[int]) -> bool:
    whole = not any(roi)
    return len(roi) == 4 and (whole or (min(roi[:2]) >= 0 and min(roi[2:]) >= 16 and max(roi) < 2**31))


def _is_range(ends: Sequence[int]) -> bool:
    return list(ends) == [0, 0] or (len(ends) == 2 and 0 <= ends[0] < ends[1] < 2**16)


_ARRAYS: dict[str, tuple[Callable[[Sequence[Any]], bool], str]] = {
    "cameras": (_are_names, '[""] or different names of letters, digits and _ that start with a letter'),
    "roi": (_is_region, "[x, y, width, height] with x, y >= 0 and width, height >= 16, or four times 0"),
    "intensity_range": (
        _is_range, "[black, white] with 0 <= black < white <= 65535, or [0, 0] for the range of the images"
    ),
}  # fmt: skip
"""What arrays must be, for which ROS knows no ranges."""
