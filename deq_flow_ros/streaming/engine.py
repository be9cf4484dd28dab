# SPDX-License-Identifier: Apache-2.0
"""What an engine is: it computes for the streams of one model, and knows neither time that goes back, nor cuts, nor
cameras.

Three rules let another engine replay compiled graphs: what an engine keeps of a stream is in its ``Slot``, where nobody
else looks; all calls of one frame have one processed size; and the host learns values of the device in ``match`` and
``finish`` alone, each time in one transfer for the whole batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming.clock import Clock
from deq_flow_ros.streaming.costs import StageTimes
from deq_flow_ros.streaming.plan import Limits
from deq_flow_ros.streaming.settings import Palette


class Slot:
    """What an engine keeps of one stream from frame to frame: the last frame, the state, what was made ready for it."""

    def clear(self) -> None:
        """Forget everything."""
        self.__dict__.clear()


AnySlot = TypeVar("AnySlot", bound=Slot)


@dataclass(frozen=True)
class Likeness:
    """How alike two frames are, see ``likeness`` in ``model/cells.py``.

    :ivar still: at a flow of zero.
    :ivar carried: at the carried flow; that of ``still`` where there is none.
    """

    still: float
    carried: float


class Wanted(NamedTuple):
    """Which fields are asked for besides the flow.

    :ivar residual: length of the last update.
    :ivar uncertainty: expected endpoint error; the model has a head for it.
    """

    residual: bool = True
    uncertainty: bool = False


@dataclass(frozen=True)
class Solved:
    """What came of one pair.

    :ivar flow: (H, W, 2) float32 px, at the resolution of the frame as it came.
    :ivar residual: (H, W) float32 px, likewise; None if it was not asked for.
    :ivar uncertainty: the same, expected endpoint error; None if it was not asked for.
    :ivar iterations: made for this pair.
    :ivar evaluations: made for its batch.
    :ivar residual_px: RMS of the last update, px of what was processed.
    :ivar stop_reason: "converged", "iterations", "deadline" or "diverged".
    :ivar likeness: of the frames at the flow that was found, see ``likeness`` in ``model/cells.py``.
    :ivar runtime: what computed it: "eager", "graphs" or "compiled".
    :ivar colors: (H, W, 3) uint8 RGB, the flow in the colours of the palette that was given; None if none was, or if
        the engine leaves painting to others.
    """

    flow: np.ndarray
    residual: np.ndarray | None
    uncertainty: np.ndarray | None
    iterations: int
    evaluations: int
    residual_px: float
    stop_reason: str
    likeness: float
    runtime: str = "eager"
    colors: np.ndarray | None = None


class Engine(ABC, Generic[AnySlot]):
    """Computes; each call is a stage, or a few, of its ``StageTimes``, and takes the slots of a batch.

    The calls of a pair in their order: ``stages.begin``, ``reencode`` where the scale changed, ``encode``, ``prepare``
    where it was not called ahead, ``match`` and perhaps ``start_cold``, ``solve``, ``finish``, ``advance``. Those of a
    first frame: ``stages.begin``, ``encode``, ``advance``. One thread at a time.

    :param model: what it computes with, on the device that does.
    :param clock: what the stages are timed by, and the deadlines of ``solve`` are on.
    :ivar stages: the times of the calls since its ``begin``.
    """

    def __init__(self, model: DEQFlow, clock: Clock) -> None:
        self.model, self.clock = model, clock
        self.device = model.device
        self.stages: StageTimes = clock.stages(self.device, 0)

    def make_ready(self, source: tuple[int, int], size: tuple[int, int], batch: int = 1) -> None:
        """Do now what is needed once for batches of frames of a (H, W) that are processed at a size: it may take long.

        Without it, it is done while the stream goes on.
        """

    def close(self) -> None:
        """Give back what was made once for each size; a later frame makes it again."""

    @property
    def about(self) -> str:
        """What computes, in words for a log."""
        return "eager"

    @abstractmethod
    def slot(self) -> AnySlot:
        """For a new stream."""

    @abstractmethod
    def encode(self, slots: Sequence[AnySlot], images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> None:
        """Scale the next frame of each stream, (H, W, 3) uint8 RGB, to its size, and encode it ("resize", "encode").

        The sizes are the same once they are padded. The images are kept until the next pair, so not to be written to.
        """

    @abstractmethod
    def reencode(self, slot: AnySlot, size: tuple[int, int], ratio: float) -> None:
        """The last frame of a stream once more, at another size, and its state with it ("reencode").

        :param ratio: the new scale by the old.
        """

    @abstractmethod
    def prepare(self, slot: AnySlot, direction: str, alone: bool = True) -> None:
        """Carry the state along, and do what else a pair needs besides its second frame ("prepare").

        :param alone: whether the pair will be solved alone, as far as that is known: what else it needs is done for
            each alone, or for a batch in ``solve``.
        """

    @abstractmethod
    def match(self, slots: Sequence[AnySlot], direction: str) -> list[Likeness]:
        """How alike the last frame and the next of each stream are ("match"); waits for the device, once."""

    @abstractmethod
    def start_cold(self, slot: AnySlot) -> None:
        """The coming solve of this stream does not begin with its carried state."""

    @abstractmethod
    def solve(self, slots: Sequence[AnySlot], direction: str, limits: Limits, scale: float) -> None:
        """Find the fixed points of a batch of pairs ("correlate", "coarse", "solve").

        Each sample stops for itself; the limits are those of all. Cold ones begin with smaller images if time allows.
        """

    @abstractmethod
    def finish(
        self, slots: Sequence[AnySlot], direction: str, wanted: Wanted, palettes: Sequence[Palette | None] = ()
    ) -> list[Solved]:
        """The fields at the resolution of the frames as they came ("upsample", "output"); waits for the device.

        :param wanted: nothing else is computed or brought to the host.
        :param palettes: of each slot, what its flow is also painted with; none for slots beyond its end. An engine may
            leave it to others.
        """

    @abstractmethod
    def advance(self, slot: AnySlot, keep_state: bool) -> None:
        """The next frame of a stream is its last one now, and what was solved is its state, if that is to be kept."""

    @abstractmethod
    def snapshot(self, slot: AnySlot) -> dict[str, np.ndarray]:
        """The state of a stream, ``hidden`` (C, h, w) and ``flow`` (2, h, w), and ``start_hidden`` and ``start_flow``,
        where its last solve began; float32 copies, the flow in cells of 8 px. What there is not is left out.
        """
