# SPDX-License-Identifier: Apache-2.0
"""Exact symmetries of a clip: another sample for the price of a copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch

from training.rendering import Clip

USES = 4
"""How often a clip can be used: as it is, and mirrored along either axis or both."""
_ACROSS, _DOWN = -1, -2  # the axes of x and y
_MIRRORED = ((), (_ACROSS,), (_DOWN,), (_ACROSS, _DOWN))
_COLOURS = list(permutations(range(3)))[1:]


def transform(clip: Clip, use: int, numbers: Sequence[int]) -> Clip:
    """The clip for its `use`-th use: 0 is the clip itself, then horizontally, vertically and doubly mirrored.

    The flow is mirrored with the images, and their colour channels are exchanged, in each clip of the batch in a way of
    its own. Both are exact: nothing is resampled.

    :param use: 0 to `USES` - 1.
    :param numbers: which clips of the run these are; together with `use` they decide the exchange of the channels.
    """
    if use == 0:
        return clip
    axes = _MIRRORED[use]
    order = torch.tensor([_COLOURS[np.random.default_rng([number, use]).integers(len(_COLOURS))] for number in numbers])
    order = order.to(clip.images.device).view(-1, 1, 3, 1, 1).expand_as(clip.images)
    signs = clip.flow.new_tensor([-1.0 if axis in axes else 1.0 for axis in (_ACROSS, _DOWN)]).view(2, 1, 1)
    return Clip(
        images=clip.images.gather(2, order).flip(axes),
        flow=clip.flow.flip(axes) * signs,
        occluded=clip.occluded.flip(axes),
        valid=clip.valid.flip(axes),
        numbers=clip.numbers,
    )
