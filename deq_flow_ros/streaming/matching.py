# SPDX-License-Identifier: Apache-2.0
"""Does a flow lead from cells of one image to cells that look alike in the other? And what follows for a stream.

A pair of images that show the same scene has, at its flow, cells whose features are alike; a pair across a cut has not,
whatever flow was found for it. So one number, the ``likeness``, says before a solve whether the carried motion is a
start for it, and behind it whether there was anything to find. ``python -m benchmarks.cuts`` measures what the
bounds below miss, and where they see a cut that is none.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from deq_flow_ros.model.grid import positions

# At its own flow a pair of one scene has 0.5 and more, in poor light as well; across a cut 0.15, images of noise alone
# 0.3 at most.
MIN_MATCH = 0.35
# A start that leads to cells less than half as alike as those of the last pair: across a cut it is a fifth and less;
# without one only where the motion has changed by many pixels at once, and a cold start is the better one there.
MIN_OF_LAST = 0.5
# A start that leads to cells that are clearly less alike than no motion at all does: the motion has ended, or turned.
MIN_OF_STILL = 0.85
LIKENESS_CELLS = 1000

UNMATCHED = "the two images before do not match"
UNEXPLAINED = "the motion so far does not explain this frame"


def likeness(flows: Tensor, features1: Tensor, features2: Tensor) -> Tensor:
    """How alike cells of two images are that a flow says are the same: mean cosine of their features, -1..1.

    Of about ``LIKENESS_CELLS`` cells, evenly spread; those that a flow leads outside do not count, and if it leads all
    outside, or is not finite, there is no likeness (0). Nor is there one of features that are zero.

    :param flows: (N, 2, H, W) in cells, x before y; flows to try.
    :param features1: (1, C, H, W), of the image on whose pixels the flow lives.
    :param features2: of the other.
    :returns: (N,) float32, on the device of the flows; reading them makes the host wait for it.
    """
    height, width = flows.shape[-2:]
    step = max(1, math.isqrt(height * width // LIKENESS_CELLS))
    x, y = positions(height, width, flows.device)[:, ::step, ::step].unbind()
    # Rounded, not interpolated: a mean of cells is less like each of them, and only a flow of zero would have none.
    some = flows[:, :, ::step, ::step].nan_to_num(nan=math.inf)
    to_x, to_y = ((at + some[:, i]).round().clamp(-1, 1e6).long() for i, at in enumerate((x, y)))
    inside = (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
    rows1, rows2 = (features[0].permute(1, 2, 0) for features in (features1, features2))
    led_to = rows2[to_y.clamp(0, height - 1), to_x.clamp(0, width - 1)]
    alike = F.cosine_similarity(rows1[::step, ::step].float(), led_to.float(), dim=-1)
    return (alike * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)


def why_not_carried(solved: float) -> str | None:
    """Why a solved pair says nothing of the next; None if it does.

    :param solved: likeness of the pair's images at the flow that was found.
    """
    return UNMATCHED if solved < MIN_MATCH else None


def why_no_start(still: float, carried: float, last: float | None) -> str | None:
    """Why the carried flow is no start for a pair, which is better begun cold; None if it is one.

    :param still: likeness of the pair's images at a flow of zero.
    :param carried: at the carried flow.
    :param last: that of the pair before at the flow that was found; None where it is not known.
    """
    changed = last is not None and max(still, carried) < MIN_OF_LAST * last
    # Where neither leads to anything alike, their ratio is that of two accidents.
    worse_than_still = still > MIN_MATCH and carried < MIN_OF_STILL * still
    return UNEXPLAINED if changed or worse_than_still else None
