# SPDX-License-Identifier: Apache-2.0
"""True flow to hold the computed one against: from a folder of flow files, a topic of the bag, or a rendered scene."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deq_flow_ros.media.bag_reader import Bag, MessageError, Recorded, natural_order
from deq_flow_ros.media.bag_source import stamp_of
from deq_flow_ros.media.bags import read_image
from deq_flow_ros.media.flow_files import FLOW_SUFFIXES, read_flow
from deq_flow_ros.media.frame import MediaError
from deq_flow_ros.media.scene import Scene
from deq_flow_ros.media.scene_bag import load_scene

if TYPE_CHECKING:
    from deq_flow_ros.evaluation.runner import Shot

Known = tuple[np.ndarray, "np.ndarray | None"]
"""Flow (H, W, 2) px, NaN where it is not known; and where it leads to something visible, (H, W) bool, if that is known.
"""
Truth = Callable[["Shot", "Shot", str], "Known | None"]
"""(earlier frame, later frame, direction) -> the true flow between them; None where it is not known."""


def exact_flow(bag: Path) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]] | None:
    """(stamp on whose pixels the flow lives, stamp it leads to) -> (flow, visible) of a rendered bag, else None."""
    settings = load_scene(bag) if bag.is_dir() else None
    if settings is None:
        return None
    scene = Scene(settings)
    numbers = {settings.stamp_ns(number): number for number in range(settings.frames)}
    return lambda here_ns, there_ns: scene.flow(numbers[here_ns], numbers[there_ns])


def scene_truth(bag: Path) -> Truth | None:
    """Of a rendered bag; None for any other input."""
    exact = exact_flow(bag)
    if exact is None:
        return None

    def truth(previous: Shot, shot: Shot, direction: str) -> Known:
        stamps = (previous.header_ns, shot.header_ns)
        return exact(*(stamps if direction == "forward" else stamps[::-1]))

    return truth


def folder_truth(folder: Path) -> Truth:
    """Flow files in natural order: the first one leads from the first frame to the second, and so on.

    It is known of successive frames and forward flow only. Raises `MediaError` where there is no flow file.
    """
    if not folder.is_dir():
        raise MediaError(f"expected a folder of flow files, got {folder}")
    files = natural_order(child for child in folder.iterdir() if child.suffix.lower() in FLOW_SUFFIXES)
    if not files:
        raise MediaError(f"the folder {folder} holds no flow file ({', '.join(FLOW_SUFFIXES)})")

    def truth(previous: Shot, shot: Shot, direction: str) -> Known | None:
        if direction != "forward" or shot.place != previous.place + 1 or previous.place >= len(files):
            return None
        flow, valid = read_flow(files[previous.place])
        return _of_size(np.where(valid[:, :, None], flow, np.float32(np.nan)), shot, str(files[previous.place])), None

    return truth


class TopicTruth:
    """Flow on a topic of the recording, 32FC2, whose header has the stamp of the image on whose pixels it lives.

    It is taken for the flow to the next image of the recording (or, with the direction "backward", from the one
    before). Read once, along with the images. Where the stamps of two images do not tell them apart, it is not known.

    :param note: hears of messages that cannot be decoded, a sentence each.
    """

    def __init__(self, bag: Path, topic: str, note: Callable[[str], None]) -> None:
        self._topic, self._note = topic, note
        self._messages: Iterator[Any] = filter(None, map(self._decoded, Bag(bag).messages(topic)))
        self._waiting: dict[int, np.ndarray] = {}
        first = next(self._messages, None)
        if first is None:
            raise MediaError(f"the recording {bag} holds no readable message on {topic}, expected true flow there")
        self._add(first)

    def __call__(self, previous: Shot, shot: Shot, direction: str) -> Known | None:
        """See `Truth`."""
        if shot.place != previous.place + 1 or shot.header_ns <= previous.header_ns:
            return None
        stamp_ns = previous.header_ns if direction == "forward" else shot.header_ns
        # Recorded after its image, but hardly later than some images on.
        while stamp_ns not in self._waiting and max(self._waiting, default=0) <= shot.header_ns:
            message = next(self._messages, None)
            if message is None:
                break
            self._add(message)
        for old in [old for old in self._waiting if old < previous.header_ns]:
            del self._waiting[old]
        flow = self._waiting.get(stamp_ns)
        return None if flow is None else (_of_size(flow, shot, f"{self._topic} at {stamp_ns} ns"), None)

    def _decoded(self, recorded: Recorded) -> Any:
        try:
            return recorded.message()
        except MessageError as error:
            self._note(str(error))
            return None

    def _add(self, message: Any) -> None:
        if getattr(message, "encoding", "") != "32FC2":
            got = getattr(message, "encoding", type(message).__name__)
            raise MediaError(f"expected true flow of encoding 32FC2 on {self._topic}, got {got}")
        self._waiting[stamp_of(message.header)] = read_image(message)


def _of_size(flow: np.ndarray, shot: Shot, what: str) -> np.ndarray:
    assert shot.image is not None
    if flow.shape[:2] != shot.image.shape[:2]:
        raise MediaError(f"expected true flow of the image's size {shot.image.shape[:2]}, got {flow.shape[:2]}: {what}")
    return flow
