# SPDX-License-Identifier: Apache-2.0
"""The engine that calls PyTorch's operations one by one: on the CPU, and on any other device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Solution, State, solve
from deq_flow_ros.model import FACTOR, DEQFlow, Encoding, Prepared, pad_to_multiple, rescale, update_px, usable_levels
from deq_flow_ros.model.cells import likeness
from deq_flow_ros.streaming.clock import MACHINE, Clock
from deq_flow_ros.streaming.engine import Engine, Likeness, Slot, Solved, Wanted
from deq_flow_ros.streaming.fields import find, pack, resize_image, unpack
from deq_flow_ros.streaming.plan import Limits
from deq_flow_ros.streaming.settings import Palette
from deq_flow_ros.streaming.warm_start import carry

# A cold pair is first solved at a half and a quarter of the resolution: of its own, however much it is enlarged.
COARSE_LEVELS = 2
COARSE_ITERATIONS = 4
# What the kind of correlation is chosen for: a stream makes few iterations, whatever is allowed. Not what happens to
# fit the budget, so that the same images give the same flow.
LOOKUPS = 4


@dataclass(frozen=True)
class EncodedImage:
    """An image and all that it contributes to a pair.

    :ivar image: (H, W, 3) uint8 RGB, as it came.
    :ivar tensor: (1, 3, h, w) uint8 or float32, what was encoded: scaled, padded.
    :ivar padding: how much of it is padding, for ``crop``.
    """

    image: np.ndarray
    tensor: Tensor
    padding: tuple[int, int, int, int]
    encoding: Encoding

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) as it came."""
        return self.image.shape[0], self.image.shape[1]


Pair = tuple[EncodedImage, EncodedImage]


class EagerSlot(Slot):
    """See ``Slot``.

    :ivar last: the frame that the next pair begins with.
    :ivar next: the frame that it ends with.
    :ivar state: the fixed point of the last pair.
    :ivar start: where the next solve begins: the state, carried along; None: from nothing.
    :ivar prepared: ``DEQFlow.prepare`` of the last frame, where that is known ahead.
    :ivar began: where the last solve did begin.
    :ivar found: what it found.
    :ivar carried: a state, and the same carried along, if that was queued already.
    """

    last: EncodedImage | None = None
    next: EncodedImage | None = None
    state: State | None = None
    start: State | None = None
    prepared: Prepared | None = None
    began: State | None = None
    found: State | None = None
    carried: tuple[State, State] | None = None

    def pair(self, direction: str) -> Pair:
        """The image on whose pixels the flow lives, and the other."""
        assert self.last is not None and self.next is not None
        return (self.last, self.next) if direction == "forward" else (self.next, self.last)


class EagerEngine(Engine[EagerSlot]):
    """See ``Engine``."""

    def __init__(self, model: DEQFlow, clock: Clock = MACHINE) -> None:
        super().__init__(model, clock)
        self._solution: Solution | None = None

    def slot(self) -> EagerSlot:
        return EagerSlot()

    @torch.inference_mode()
    def encode(
        self, slots: Sequence[EagerSlot], images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
    ) -> None:
        pairs = zip(images, sizes, strict=True)
        scaled = [image if image.shape[:2] == size else resize_image(image, size) for image, size in pairs]
        if any(small is not image for small, image in zip(scaled, images, strict=True)):
            self.stages.lap("resize")
        for slot, image in zip(slots, encode_images(self.model, self.device, images, scaled), strict=True):
            slot.next = image
        self.stages.lap("encode")

    @torch.inference_mode()
    def reencode(self, slot: EagerSlot, size: tuple[int, int], ratio: float) -> None:
        assert slot.last is not None
        image = slot.last.image
        (slot.last,) = encode_images(self.model, self.device, [image], [resize_image(image, size)])
        if slot.state is not None:
            slot.state = rescale(slot.state, slot.last.encoding.context.shape[-2:], ratio)
        self.stages.lap("reencode")

    @torch.inference_mode()
    def prepare(self, slot: EagerSlot, direction: str, alone: bool = True) -> None:
        assert slot.last is not None
        slot.start = None if slot.state is None else carry(slot.state, direction)
        # Forward flow lives on the last frame's pixels, whose context is known; backward flow on those of the next.
        ahead = direction == "forward" and alone
        slot.prepared = self.model.prepare(slot.last.encoding) if ahead else None
        self.stages.lap("prepare")

    @torch.inference_mode()
    def match(self, slots: Sequence[EagerSlot], direction: str) -> list[Likeness]:
        values: list[Tensor] = []
        for slot in slots:
            first, second = (image.encoding for image in slot.pair(direction))
            still = first.features.new_zeros((1, 2, *first.features.shape[-2:]), dtype=torch.float32)
            flows = torch.cat((still, still if slot.start is None else slot.start[1]))
            values.append(likeness(flows, first.features, second.features))
        numbers = torch.stack(values).tolist()
        self.stages.lap("match")
        return [Likeness(*pair) for pair in numbers]

    def start_cold(self, slot: EagerSlot) -> None:
        slot.start = None

    @torch.inference_mode()
    def solve(self, slots: Sequence[EagerSlot], direction: str, limits: Limits, scale: float) -> None:
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
            max_iterations=limits.max_iterations,
            tolerance=limits.tolerance,
            measure=update_px,
            deadline_ns=limits.deadline_ns,
            now_ns=self.clock.now_ns,
            min_iterations=limits.min_iterations,
            iteration_cost_ns=1e6 * limits.iteration_ms,
            check_start=False,  # a stream goes on: a state that is not finite resets it, and the frame says so
        )
        self.stages.lap("solve")

    def _find_starts(self, slots: Sequence[EagerSlot], pairs: Sequence[Pair], limits: Limits, scale: float) -> None:
        """Where each solve begins; a cold one with smaller versions of the pair, if there is time."""
        cold = [i for i, slot in enumerate(slots) if slot.start is None]
        for slot, (image, _) in zip(slots, pairs, strict=True):
            slot.began = slot.start or self.model.initial_state(image.encoding)
        levels = coarse_levels(scale, pairs[0][0].tensor.shape[-2:]) if cold else 0
        if not levels:
            return
        if limits.deadline_ns is not None:
            needed_ms = limits.coarse_ms + limits.iteration_ms
            if self.clock.now_ns() + 1e6 * needed_ms > limits.deadline_ns:
                return
        for i, state in zip(cold, self._solve_coarsely(pairs, cold, levels), strict=True):
            slots[i].began = state
        self.stages.lap("coarse")

    def _solve_coarsely(self, pairs: Sequence[Pair], cold: Sequence[int], levels: int) -> list[State]:
        """The states of smaller versions of some of the pairs."""
        image1, image2 = (joined([pairs[i][which].tensor for i in cold]) for which in (0, 1))
        state = self.model.coarse_start(image1, image2, levels, COARSE_ITERATIONS)
        assert state is not None
        return [sample(state, place) for place in range(len(cold))]

    @torch.inference_mode()
    def finish(
        self, slots: Sequence[EagerSlot], direction: str, wanted: Wanted, palettes: Sequence[Palette | None] = ()
    ) -> list[Solved]:
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
        solved = unpack(solution, rows, size, wanted, [(first.padding, first.size) for first, _ in pairs])
        for i, slot in enumerate(slots):
            slot.found = sample(solution.state, i)
        self.stages.lap("output")
        return solved

    def advance(self, slot: EagerSlot, keep_state: bool) -> None:
        slot.last, slot.next, slot.state = slot.next, None, slot.found if keep_state else None
        slot.start = slot.prepared = slot.found = None

    def snapshot(self, slot: EagerSlot) -> dict[str, np.ndarray]:
        return {
            prefix + name: tensor[0].float().cpu().numpy().copy()
            for prefix, state in (("", slot.state), ("start_", slot.began))
            if state is not None
            for name, tensor in zip(("hidden", "flow"), state, strict=True)
        }


def coarse_levels(scale: float, padded: Sequence[int]) -> int:
    """How many smaller versions of a cold pair are solved first.

    :param scale: that it is processed at.
    :param padded: (H, W) of what is encoded.
    """
    enlarged = max(0, round(math.log2(scale)))
    return min(COARSE_LEVELS + enlarged, usable_levels(padded[0], padded[1]))


def encode_images(
    model: DEQFlow, device: torch.device, images: Sequence[np.ndarray], scaled: Sequence[np.ndarray]
) -> list[EncodedImage]:
    """Encode images as one batch; scaled, (h, w, 3) uint8 RGB, they have one padded size."""
    padded = []
    for image in scaled:
        # PyTorch warns of arrays that cannot be written to, as Pillow's are, though nobody writes here.
        # (H, W, 3) seen as (1, 3, H, W) already is the channels_last layout that the convolutions want.
        tensor = torch.from_numpy(np.require(image, requirements=("C", "W"))).to(device).permute(2, 0, 1)[None]
        whole = not any(side % FACTOR for side in image.shape[:2])
        padded.append((tensor, (0, 0, 0, 0)) if whole else pad_to_multiple(tensor.float()))
    encoding = model.encode(joined([tensor for tensor, _ in padded]))
    return [
        EncodedImage(image, tensor, padding, Encoding(*sample(encoding, i)))
        for i, (image, (tensor, padding)) in enumerate(zip(images, padded, strict=True))
    ]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) as one (B, ...); of one tensor itself, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def sample(batch: Sequence[Tensor], index: int) -> tuple[Tensor, ...]:
    """One sample, (1, ...), of tensors (B, ...)."""
    return tuple(tensor[index : index + 1] for tensor in batch)
