# SPDX-License-Identifier: Apache-2.0
"""What comes into an evaluation: the frames of a recording, and true flow if there is any.

True flow is read from a folder of flow files or from a topic of the bag, or comes from a rendered scene.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros.demo.bag import exact_flow
from deq_flow_ros.imaging import Frame, MediaError, stamp_to_ns
from deq_flow_ros.imaging.encodings import EncodingError, Levels, to_rgb
from deq_flow_ros.recordings.bag_reader import Bag, MessageError, Recorded
from deq_flow_ros.recordings.bags import read_image
from deq_flow_ros.recordings.files import natural_order, visible_files
from deq_flow_ros.recordings.flow_files import FLOW_SUFFIXES, read_flow


@dataclass(frozen=True, eq=False)
class InputFrame:
    """A frame of the recording.

    :ivar index: number among the frames that could be read, from 0; ``place`` is that among all frames.
    :ivar stamp_ns: its stamp in the stream: that of the header, or the time of recording.
    :ivar image: (H, W, 3) uint8 RGB; None if it cannot be decoded, and then ``problem`` says why.
    :ivar convert_ms: the time that decoding took.
    """

    index: int
    place: int
    stamp_ns: int
    header_ns: int
    record_ns: int
    frame_id: str
    image: np.ndarray | None
    encoding: str
    problem: str = ""
    convert_ms: float = 0.0

    @classmethod
    def of(
        cls, index: int, frame: Frame, stamps: str = "header", left_out: int = 0, levels: Levels | None = None
    ) -> InputFrame:
        """Decode a frame of a source.

        :param stamps: "header" takes the stamp of the header, "record" the time at which the frame was recorded.
        :param left_out: the number of earlier frames that could not be read.
        :param levels: see ``to_rgb``.
        """
        start = time.perf_counter()
        image, problem = None, frame.problem
        try:
            if not problem:
                layout = (frame.height, frame.width, frame.step, frame.encoding, frame.is_bigendian)
                image = to_rgb(frame.data, *layout, levels)
        except EncodingError as error:
            problem = str(error)
        took_ms = 1e3 * (time.perf_counter() - start)
        if image is not None and not image.flags.writeable:
            image = image.copy()  # PyTorch warns of a view of the file's bytes
        stamps_ns = (frame.record_ns if stamps == "record" else frame.stamp_ns, frame.stamp_ns, frame.record_ns)
        return cls(index, index + left_out, *stamps_ns, frame.frame_id, image, frame.encoding, problem, took_ms)


KnownFlow = tuple[np.ndarray, "np.ndarray | None"]
"""Flow (H, W, 2) px, NaN where it is not known; and whether pixels are visible in both images, (H, W) bool, or None."""
Truth = Callable[[InputFrame, InputFrame, str], "KnownFlow | None"]
"""Takes the earlier frame, the later frame and the direction; returns the true flow, or None if it is not known."""


def scene_truth(bag: Path) -> Truth | None:
    """The exact flow of a rendered bag; None for any other input."""
    exact = exact_flow(bag)
    if exact is None:
        return None

    def truth(earlier: InputFrame, later: InputFrame, direction: str) -> KnownFlow:
        here, there = (earlier, later) if direction == "forward" else (later, earlier)
        return exact(here.header_ns, there.header_ns)

    return truth


def flow_files(folder: Path) -> list[Path]:
    """The flow files of a folder in natural order.

    :raises MediaError: if it is no folder, or holds none, or files of several formats, whose order nobody knows.
    """
    if not folder.is_dir():
        raise MediaError(f"expected a folder of flow files, got {folder}")
    files = natural_order(child for child in visible_files(folder) if child.suffix.lower() in FLOW_SUFFIXES)
    if not files:
        raise MediaError(f"the folder {folder} holds no flow file ({', '.join(FLOW_SUFFIXES)})")
    if len(formats := sorted({file.suffix.lower() for file in files})) > 1:
        raise MediaError(f"expected flow files of one format in {folder}, got {' and '.join(formats)}")
    return files


def unlike_number(folder: str | None, frames: int) -> list[str]:
    """Say if the ``folder`` of true flow, if any, has not as many files as there are pairs, or ``frames``."""
    if folder is None or (files := len(flow_files(Path(folder)))) in (frames - 1, frames):
        return []
    pairs = f"the recording has {frames} frames, which are {frames - 1} pairs"
    return [f"the true flow {folder} has {files} files, and {pairs}: is the first file the flow of the first pair?"]


def folder_truth(folder: Path) -> Truth:
    """True flow, forward and between successive frames, from files in natural order.

    :raises MediaError: see ``flow_files``.
    """
    files = flow_files(folder)

    def truth(earlier: InputFrame, later: InputFrame, direction: str) -> KnownFlow | None:
        if direction != "forward" or later.place != earlier.place + 1 or earlier.place >= len(files):
            return None
        file = files[earlier.place]
        flow, valid = read_flow(file)
        return _of_size(np.where(valid[:, :, None], flow, np.float32(np.nan)), later, str(file)), None

    return truth


class TopicTruth:
    """True flow from a topic of 32FC2 images, which have the stamp of the image on whose pixels the flow is defined.

    It leads to the next image of the recording (or, with the direction "backward", to the previous one), and is not
    known if two images have the same stamp. The topic is read once, in parallel with the images.

    :param note: called with a sentence for each message that cannot be decoded.
    :raises MediaError: if the topic holds no readable flow.
    """

    def __init__(self, bag: Path, topic: str, note: Callable[[str], None]) -> None:
        self._topic, self._note, source = topic, note, Bag(bag)
        self._messages: Iterator[Any] = filter(None, map(self._decoded, source.messages(topic)))
        self._waiting: dict[int, np.ndarray] = {}
        first = next(self._messages, None)
        if first is None:
            raise MediaError(
                f"expected true flow in {topic}, but that is neither a folder nor a topic of {bag} with readable "
                f"messages; its topics: {', '.join(sorted(source.topics)) or 'none'}"
            )
        self._add(first)

    def __call__(self, earlier: InputFrame, later: InputFrame, direction: str) -> KnownFlow | None:
        if later.place != earlier.place + 1 or later.header_ns <= earlier.header_ns:
            return None
        stamp_ns = earlier.header_ns if direction == "forward" else later.header_ns
        # Flow is recorded after its image, but at most a few images later.
        while stamp_ns not in self._waiting and max(self._waiting, default=0) <= later.header_ns:
            message = next(self._messages, None)
            if message is None:
                break
            self._add(message)
        for old in [old for old in self._waiting if old < earlier.header_ns]:
            del self._waiting[old]
        flow = self._waiting.get(stamp_ns)
        return None if flow is None else (_of_size(flow, later, f"{self._topic} at {stamp_ns} ns"), None)

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
        self._waiting[stamp_to_ns(message.header.stamp)] = read_image(message)


def _of_size(flow: np.ndarray, frame: InputFrame, what: str) -> np.ndarray:
    assert frame.image is not None
    if flow.shape[:2] != frame.image.shape[:2]:
        (height, width), (h, w) = frame.image.shape[:2], flow.shape[:2]
        raise MediaError(f"expected true flow of the image's size {width}x{height}, got {w}x{h}: {what}")
    return flow
