# SPDX-License-Identifier: Apache-2.0
"""Frames of a source, read ahead in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

from deq_flow_ros.imaging.frame import Frame
from deq_flow_ros.recordings.source import Source

READ_AHEAD = 4
"""Frames decoded in advance, so that a slow one does not come late."""


class FrameReader:
    """Iterates (pass number, frame) of a source, read ahead in a thread of its own; None where none is ready yet."""

    def __init__(self, source: Source, loop: bool) -> None:
        self._source = source
        self._loop = loop and not source.live
        self._frames: queue.Queue[tuple[int, Frame] | Exception | None] = queue.Queue(READ_AHEAD)
        self._closed = False
        # A daemon, because a camera that delivers nothing cannot be interrupted.
        self._thread = threading.Thread(target=self._read, name="frame_reader", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        number = 0
        try:
            while not self._closed:
                for frame in self._source.frames():
                    if not self._put((number, frame)):
                        return
                number += 1
                if not self._loop:
                    break
            self._put(None)
        except Exception as error:  # handed to the thread that plays
            self._put(error)

    def _put(self, item: tuple[int, Frame] | Exception | None) -> bool:
        while not self._closed:
            with contextlib.suppress(queue.Full):
                self._frames.put(item, timeout=0.1)
                return True
        return False

    def __iter__(self) -> Iterator[tuple[int, Frame] | None]:
        while True:
            try:
                item = self._frames.get(timeout=0.05)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Stop reading ahead.

        Waits a moment for the frame in hand: a process that ends while a thread of it decodes a video is aborted.
        """
        self._closed = True
        self._thread.join(timeout=1.0)
