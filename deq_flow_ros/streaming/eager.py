# SPDX-License-Identifier: Apache-2.0
"""The engine computes for the streams of one model, and knows neither time that goes back, nor cuts, nor cameras.

This one calls PyTorch's operations one by one: on the CPU, and on any other device. Three rules let another one replay
captured graphs instead: what an engine keeps of a stream is in its ``Slot``, where nobody else looks; all calls of one
frame have one processed size; and the host learns values of the device in ``match`` and ``finish`` alone, each time in
one transfer for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Solution, State, solve
from deq_flow_ros.model import FACTOR, DEQFlow, Encoding, Prepared, pad_to_multiple, rescale, update_px, usable_levels
from deq_flow_ros.model.cells import carry, likeness
from deq_flow_ros.streaming.clock import MACHINE, Clock
from deq_flow_ros.streaming.fields import find, pack, resize_image, unpack
from deq_flow_ros.streaming.interface import Likeness, Palette, Solved, Wanted
from deq_flow_ros.streaming.plan import Limits

# A cold pair is first solved at a half and a quarter of the resolution: of its own, however much it is enlarged.
COARSE_LEVELS = 2
COARSE_ITERATIONS = 4
# What the kind of correlation is chosen for: a stream makes few iterations, whatever is allowed. Not what happens to
# fit the budget, so that the same images give the same flow.
LOOKUPS = 4


@dataclass(frozen=True)
class EncodedImage:
    """An image and all that it contributes to a pair."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, as it came
    tensor: Tensor  # (1, 3, h, w) uint8 or float32, what was encoded: scaled, padded
    padding: tuple[int, int, int, int]  # how much of it is padding, for ``crop``
    encoding: Encoding


Pair = tuple[EncodedImage, EncodedImage]


class Slot:
    """What an engine keeps of one stream from frame to frame."""

    last: EncodedImage | None = None  # the frame that the next pair begins with
    next: EncodedImage | None = None  # the frame that it ends with
    state: State | None = None  # the fixed point of the last pair
    start: State | None = None  # where the next solve begins: the state, carried along; None: from nothing
    prepared: Prepared | None = None  # ``DEQFlow.prepare`` of the last frame, where that is known ahead
    began: State | None = None  # where the last solve did begin
    found: State | None = None  # what it found
    carried: tuple[State, State] | None = None  # a state, and the same carried along, if that was queued already

    def clear(self) -> None:
        """Forget everything."""
        self.__dict__.clear()

    def pair(self, direction: str) -> Pair:
        """The image on whose pixels the flow lives, and the other."""
        assert self.last is not None and self.next is not None
        return (self.last, self.next) if direction == "forward" else (self.next, self.last)


class EagerEngine:
    """Computes; each call is a stage, or a few, of its ``StageTimes``, and takes the slots of a batch.

    The calls of a pair in their order: ``stages.begin``, ``reencode`` where the scale changed, ``encode``, ``prepare``
    where it was not called ahead, ``match`` and perhaps ``start_cold``, ``solve``, ``finish``, ``advance``. Those of a
    first frame: ``stages.begin``, ``encode``, ``advance``. One thread at a time.

    :param model: what it computes with, on the device that does.
    :param clock: what the stages are timed by, and the deadlines of ``solve`` are on.
    :ivar stages: the times of the calls since its ``begin``.
    """

    def __init__(self, model: DEQFlow, clock: Clock = MACHINE) -> None:
        self.model, self.clock, self.device = model, clock, model.device
        self.stages = clock.stages(self.device)
        self._solution: Solution | None = None

    @property
    def about(self) -> str:
        """What computes, in words for a log."""
        return "eager"

    def make_ready(self, source: tuple[int, int], size: tuple[int, int], batch: int = 1) -> None:
        """Do ahead what frames of a (H, W) need once for a processed size; else it is done while a stream goes on."""

    def close(self) -> None:
        """Give back what was made once for each size; a later frame makes it again."""

    @torch.inference_mode()
    def encode(self, slots: Sequence[Slot], images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> None:
        """Scale the next frame of each stream, (H, W, 3) uint8 RGB, to its size, and encode it ("resize", "encode").

        The sizes are the same once they are padded. The images are kept until the next pair, so not to be written to.
        """
        pairs = zip(images, sizes, strict=True)
        scaled = [image if image.shape[:2] == size else resize_image(image, size) for image, size in pairs]
        if any(small is not image for small, image in zip(scaled, images, strict=True)):
            self.stages.lap("resize")
        for slot, image in zip(slots, self._encode(images, scaled), strict=True):
            slot.next = image
        self.stages.lap("encode")

    def _encode(self, images: Sequence[np.ndarray], scaled: Sequence[np.ndarray]) -> list[EncodedImage]:
        """Encode images as one batch; scaled, (h, w, 3) uint8 RGB, they have one padded size."""
        padded = []
        for image in scaled:
            # PyTorch warns of arrays that cannot be written to, as Pillow's are, though nobody writes here.
            # (H, W, 3) seen as (1, 3, H, W) already is the channels_last layout that the convolutions want.
            tensor = torch.from_numpy(np.require(image, requirements=("C", "W"))).to(self.device).permute(2, 0, 1)[None]
            whole = not any(side % FACTOR for side in image.shape[:2])
            padded.append((tensor, (0, 0, 0, 0)) if whole else pad_to_multiple(tensor.float()))
        encoding = self.model.encode(joined([tensor for tensor, _ in padded]))
        return [
            EncodedImage(image, tensor, padding, Encoding(*sample(encoding, i)))
            for i, (image, (tensor, padding)) in enumerate(zip(images, padded, strict=True))
        ]

    @torch.inference_mode()
    def reencode(self, slot: Slot, size: tuple[int, int], ratio: float) -> None:
        """The last frame of a stream once more, at another size, and its state with it ("reencode").

        :param ratio: the new scale by the old.
        """
        assert slot.last is not None
        (slot.last,) = self._encode([slot.last.image], [resize_image(slot.last.image, size)])
        if slot.state is not None:
            slot.state = rescale(slot.state, slot.last.encoding.context.shape[-2:], ratio)
        self.stages.lap("reencode")

    @torch.inference_mode()
    def prepare(self, slot: Slot, direction: str, alone: bool = True) -> None:
        """Carry the state along, and do what else a pair needs besides its second frame ("prepare").

        :param alone: whether the pair will be solved alone, as far as that is known: what else it needs is done for
            each alone, or for a batch in ``solve``.
        """
        assert slot.last is not None
        slot.start = None if slot.state is None else carry(slot.state, direction)
        # Forward flow lives on the last frame's pixels, whose context is known; backward flow on those of the next.
        ahead = direction == "forward" and alone
        slot.prepared = self.model.prepare(slot.last.encoding) if ahead else None
        self.stages.lap("prepare")

    @torch.inference_mode()
    def match(self, slots: Sequence[Slot], direction: str) -> list[Likeness]:
        """How alike the last frame and the next of each stream are ("match"); waits for the device, once."""
        values: list[Tensor] = []
        for slot in slots:
            first, second = (image.encoding for image in slot.pair(direction))
            still = first.features.new_zeros((1, 2, *first.features.shape[-2:]), dtype=torch.float32)
            flows = torch.cat((still, still if slot.start is None else slot.start[1]))
            values.append(likeness(flows, first.features, second.features))
        numbers = torch.stack(values).tolist()
        self.stages.lap("match")
        return [Likeness(*pair) for pair in numbers]

    def start_cold(self, slot: Slot) -> None:
        """The coming solve of this stream does not begin with its carried state."""
        slot.start = None

    @torch.inference_mode()
    def solve(self, slots: Sequence[Slot], direction: str, limits: Limits, scale: float) -> None:
        """Find the fixed points of a batch of pairs ("correlate", "coarse", "solve").

        Each sample stops for itself; the limits are those of all. Cold ones begin with smaller images if time allows.
        """
        pairs = [slot.pair(direction) for slot in slots]
        first, second = (
            Encoding(*map(joined, zip(*(image.encoding for image in images), strict=True)))
            for images in zip(*pairs, strict=True)
        )
        prepared = slots[0].prepared
        if len(slots) > 1:
            # What was prepared for each pair alone cannot be joined: only the update operator knows what is in it.
            prepared = self.model.prepare(first)
            self.stages.lap("prepare")
        problem = self.model.problem(first, second, prepared, iterations=min(limits.max_iterations, LOOKUPS))
        self.stages.lap("correlate")
        self._find_starts(slots, pairs, limits, scale)
        self._solution = solve(
            self.stages.counted(problem),
            tuple(map(joined, zip(*(slot.began for slot in slots if slot.began is not None), strict=True))),
            max_iterations=limits.max_iterations, tolerance=limits.tolerance, measure=update_px,
            deadline_ns=limits.deadline_ns, now_ns=self.clock.now_ns, min_iterations=limits.min_iterations,
            iteration_cost_ns=1e6 * limits.iteration_ms,
            check_start=False,  # a stream goes on: a state that is not finite resets it, and the frame says so
        )  # fmt: skip
        self.stages.lap("solve")

    def _find_starts(self, slots: Sequence[Slot], pairs: Sequence[Pair], limits: Limits, scale: float) -> None:
        """Where each solve begins; a cold one with smaller versions of the pair, if there is time."""
        cold = [i for i, slot in enumerate(slots) if slot.start is None]
        for slot, (image, _) in zip(slots, pairs, strict=True):
            slot.began = slot.start or self.model.initial_state(image.encoding)
        levels = coarse_levels(scale, pairs[0][0].tensor.shape[-2:]) if cold else 0
        if not levels:
            return
        needed_ms = limits.coarse_ms + limits.iteration_ms
        if limits.deadline_ns is not None and self.clock.now_ns() + 1e6 * needed_ms > limits.deadline_ns:
            return
        for i, state in zip(cold, self._solve_coarsely([pairs[i] for i in cold], levels), strict=True):
            slots[i].began = state
        self.stages.lap("coarse")

    def _solve_coarsely(self, pairs: Sequence[Pair], levels: int) -> list[State]:
        """The states of smaller versions of pairs."""
        image1, image2 = (joined([image.tensor for image in images]) for images in zip(*pairs, strict=True))
        state = self.model.coarse_start(image1, image2, levels, COARSE_ITERATIONS)
        assert state is not None
        return [sample(state, place) for place in range(len(pairs))]

    @torch.inference_mode()
    def finish(
        self, slots: Sequence[Slot], direction: str, wanted: Wanted, palettes: Sequence[Palette | None] = ()
    ) -> list[Solved]:
        """The fields at the resolution of the frames as they came ("upsample", "output"); waits for the device.

        :param wanted: nothing else is computed or brought to the host.
        :param palettes: of each slot, what its flow is also painted with; this engine leaves that to others.
        """
        solution, self._solution = self._solution, None
        assert solution is not None
        fields = find(self.model, solution, wanted)
        self.stages.lap("upsample")
        pairs = [slot.pair(direction) for slot in slots]
        alike = [
            likeness(solution.state[1][i : i + 1], first.encoding.features, second.encoding.features)
            for i, (first, second) in enumerate(pairs)
        ]
        rows = pack(solution, fields, torch.cat(alike)).cpu().numpy()
        size = fields[0].shape[2], fields[0].shape[3]
        came = [(first.padding, first.image.shape[:2]) for first, _ in pairs]
        solved = unpack(solution, rows, size, wanted, came)
        for i, slot in enumerate(slots):
            slot.found = sample(solution.state, i)
        self.stages.lap("output")
        return solved

    def advance(self, slot: Slot, keep_state: bool) -> None:
        """The next frame of a stream is its last one now, and what was solved is its state, if that is to be kept."""
        slot.last, slot.next, slot.state = slot.next, None, slot.found if keep_state else None
        slot.start = slot.prepared = slot.found = None

    def snapshot(self, slot: Slot) -> dict[str, np.ndarray]:
        """The state of a stream, ``hidden`` (C, h, w) and ``flow`` (2, h, w), and ``start_hidden`` and ``start_flow``,
        where its last solve began; float32 copies, the flow in cells of 8 px. What there is not is left out.
        """
        return {
            prefix + name: tensor[0].float().cpu().numpy().copy()
            for prefix, state in (("", slot.state), ("start_", slot.began))
            if state is not None
            for name, tensor in zip(("hidden", "flow"), state, strict=True)
        }


def coarse_levels(scale: float, padded: Sequence[int]) -> int:
    """How many smaller versions of a cold pair are solved first, of (H, W) with padding at a processing scale."""
    enlarged = max(0, round(math.log2(scale)))
    return min(COARSE_LEVELS + enlarged, usable_levels(padded[0], padded[1]))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) as one (B, ...); of one tensor itself, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def sample(batch: Sequence[Tensor], index: int) -> tuple[Tensor, ...]:
    """One sample, (1, ...), of tensors (B, ...)."""
    return tuple(tensor[index : index + 1] for tensor in batch)
