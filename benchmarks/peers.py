# SPDX-License-Identifier: Apache-2.0
"""The ways to flow that benchmarks compare a stream with: OpenCV's methods, and the network on pairs of images, as the
method's release works (``pairwise``) and as fast as it can be without a frame before (``unrolled``).
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from deq_flow_ros.evaluation.methods import FlowFunction, dense_inverse_search, farneback
from deq_flow_ros.model import DEQFlow, Encoding, crop, pad_to_multiple
from deq_flow_ros.model.encoders import SeparateEncoders
from deq_flow_ros.model.update import GmaUpdate, RaftUpdate
from deq_flow_ros.model.weight_norm import add_weight_norm
from training.flow_dataset import to_array, to_tensor

OPENCV: dict[str, FlowFunction] = {
    "Farneback": farneback,
    "DIS fast": dense_inverse_search(cv2.DISOPTICAL_FLOW_PRESET_FAST),
    "DIS medium": dense_inverse_search(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM),
}


def padded_pair(
    image1: np.ndarray, image2: np.ndarray, device: torch.device
) -> tuple[tuple[int, int, int, int], Tensor, Tensor]:
    """The padding, for ``crop``, and the images as (1, 3, h, w) float32, h and w multiples of 8."""
    (first, padding), (second, _) = (pad_to_multiple(to_tensor(image, device).float()) for image in (image1, image2))
    return padding, first, second


def _of_arrays(flow: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> FlowFunction:
    """A function of images (1, 3, H, W), H and W multiples of 8, as one from and to arrays, copies included."""

    @torch.inference_mode()
    def function(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        padding, first, second = padded_pair(image1, image2, device)
        return np.ascontiguousarray(to_array(crop(flow(first, second), padding)))

    return function


def unrolled(model: DEQFlow, iterations: int) -> FlowFunction:
    """A recurrent network in the manner of RAFT, of our parts at their fastest: encode, start from zero, iterate."""

    def flow(image1: Tensor, image2: Tensor) -> Tensor:
        features1, features2, context = _encode_pair(model, image1, image2, torch.channels_last)
        # Of the second image a pair takes the features alone.
        encoding1, encoding2 = Encoding(features1, context), Encoding(features2, context)
        problem, state = model.problem(encoding1, encoding2, iterations=iterations), model.initial_state(encoding1)
        for _ in range(iterations):
            state = problem(*state)
        return model.upsample(state)

    return _of_arrays(flow, model.device)


def as_released(model: DEQFlow) -> DEQFlow:
    """The model with weight normalisation, as the release has it, in PyTorch's default memory layout.

    :param model: from ``load_model(..., fold=False)``; it is changed in place.
    :raises ValueError: for an update operator that the release does not have.
    """
    if not isinstance(model.update_block, (RaftUpdate, GmaUpdate)):
        raise ValueError(f"the pairwise way knows the operators raft and gma, got {model.architecture.update!r}")
    if not model.architecture.weight_norm:
        add_weight_norm(model.update_block)
    return model.to(memory_format=torch.contiguous_format).requires_grad_(False)  # type: ignore[call-overload]


def pairwise(model: DEQFlow, iterations: int) -> FlowFunction:
    """The stateless pairwise way in which the method's release works: a plain, independent form of the same function.

    The correlation is looked up by ``grid_sample`` level by level, the context convolved in every iteration, each gate
    is a convolution of its own, weight normalisation is computed anew in every call, batch norm not folded.

    :param model: from ``as_released``.
    """
    a, block = model.architecture, model.update_block
    assert isinstance(block, (RaftUpdate, GmaUpdate))

    def flow(image1: Tensor, image2: Tensor) -> Tensor:
        features1, features2, context = _encode_pair(model, image1, image2, torch.contiguous_format)
        pyramid = _pooled_volumes(features1, features2, a.correlation_levels)
        batch, _, height, width = context.shape
        with parametrize.cached():
            hidden = context.new_zeros(batch, a.hidden_dim, height, width)
            motion = context.new_zeros((batch, 2, height, width), dtype=torch.float32)
            attention = block.attention(context) if isinstance(block, GmaUpdate) else None
            for _ in range(iterations):
                correlation = _grid_sampled(pyramid, motion, a.correlation_radius).to(hidden.dtype)
                hidden, motion = _update(block, hidden, motion, correlation, context, attention)
        return model.upsample((hidden, motion))

    return _of_arrays(flow, model.device)


def _encode_pair(model: DEQFlow, image1: Tensor, image2: Tensor, layout: torch.memory_format) -> tuple[Tensor, ...]:
    """Features of both images, encoded as one batch where the encoder allows that, and the context of the first."""
    both = (2 * (torch.cat((image1, image2)) / 255) - 1).to(next(model.parameters()).dtype)
    both, encoder = both.contiguous(memory_format=layout), model.encoder
    if isinstance(encoder, SeparateEncoders):
        features, context = encoder.fnet(both), F.relu(encoder.cnet(both[: len(image1)]))
    else:  # one trunk gives both; the context of image 2 comes along, 2 % of the work of this stage
        features, context = encoder(both)
    return *features.chunk(2), context[: len(image1)]


def _pooled_volumes(features1: Tensor, features2: Tensor, levels: int) -> list[Tensor]:
    """Similarities of all positions, (B * H * W, 1, h, w) for each level, of half the size of the level before."""
    batch, channels, height, width = features1.shape
    volume = torch.matmul(features1.flatten(2).transpose(1, 2), features2.flatten(2)).float() / channels**0.5
    pyramid = [volume.view(batch * height * width, 1, height, width)]
    while len(pyramid) < levels and min(pyramid[-1].shape[-2:]) > 1:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    # Below one cell nothing is left to pool; what lies outside of a level counts as zero.
    return pyramid + [torch.zeros_like(pyramid[-1][..., :1, :1])] * (levels - len(pyramid))


def _grid_sampled(pyramid: list[Tensor], flow: Tensor, radius: int) -> Tensor:
    """Correlation around position + flow, (B, levels * (2 radius + 1)**2, H, W); the x offset is the outer index."""
    batch, _, height, width = flow.shape
    sides = (torch.arange(side, device=flow.device) for side in (height, width))
    y, x = torch.meshgrid(*sides, indexing="ij")
    target = (torch.stack((x, y)) + flow).permute(0, 2, 3, 1).reshape(batch * height * width, 1, 1, 2)
    steps = torch.arange(-radius, radius + 1, device=flow.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)  # [x offset, y offset]
    sampled = []
    for level, volume in enumerate(pyramid):
        x, y = (2 * (target / 2**level + offsets + 0.5)).unbind(-1)
        grid = torch.stack((x / volume.shape[-1] - 1, y / volume.shape[-2] - 1), -1)
        values = F.grid_sample(volume, grid, align_corners=False)
        sampled.append(values.view(batch, height, width, -1))
    return torch.cat(sampled, -1).permute(0, 3, 1, 2).contiguous()


def _update(
    block: RaftUpdate | GmaUpdate, hidden: Tensor, flow: Tensor, correlation: Tensor, context: Tensor,
    attention: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One iteration in which nothing was computed beforehand."""
    motion = block.encoder(correlation, flow)
    inputs = [context, motion]
    if isinstance(block, GmaUpdate):
        inputs.append(block.gma(motion, attention))
    fixed, gru = torch.cat(inputs, 1), block.gru
    for suffix in "12":
        convz, convr, convq = (gru.get_submodule(f"conv{gate}{suffix}") for gate in "zrq")
        seen = torch.cat((hidden, fixed), 1)
        z, r = torch.sigmoid(convz(seen)), torch.sigmoid(convr(seen))
        q = torch.tanh(convq(torch.cat((r * hidden, fixed), 1)))
        hidden = (1 - z) * hidden + z * q
    return hidden, flow + block.flow_head(hidden)
