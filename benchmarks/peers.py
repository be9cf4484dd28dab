# SPDX-License-Identifier: Apache-2.0
"""The ways to the flow of a stream that ``benchmarks.latency`` compares, each from and to arrays at full resolution.

Every one takes the later image of a pair when its turn comes: ``field(earlier, later, stamp_ns)``, (H, W, 3) uint8 RGB
each, returns the flow on the earlier image's pixels, (H, W, 2) float32 px, and leaves in ``stage_ms`` what its stages
took.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from benchmarks.sequences import padded_pair
from deq_flow_ros.evaluation.methods import FlowFunction, dense_inverse_search, farneback
from deq_flow_ros.model import DEQFlow, Encoding, crop
from deq_flow_ros.model.encoders import SeparateEncoders
from deq_flow_ros.model.operators import add_weight_norm
from deq_flow_ros.model.update import GmaUpdate, RaftUpdate
from deq_flow_ros.streaming import FlowEstimator
from deq_flow_ros.streaming.clock import stage_times
from deq_flow_ros.streaming.costs import StageTimes
from training.evaluate import to_array


class Method:
    """One way to compute the flow of a stream: a function of two images, such as those of OpenCV, or a subclass.

    :ivar is_stream: whether the method must see every pair, because it continues from the one before.
    :ivar stage_ms: the times of the stages of the last field; empty where the stages are not known.
    :ivar iterations: of the update operator per field; 0 for methods without one.
    """

    is_stream = False

    def __init__(self, iterations: int = 0, function: FlowFunction | None = None) -> None:
        self.iterations, self._function = iterations, function
        self.stage_ms: dict[str, float] = {}

    def field(self, earlier: np.ndarray, later: np.ndarray, stamp_ns: int) -> np.ndarray | None:
        """The flow of a pair; None if a stream began anew, and so has none, or one from a cold start."""
        assert self._function is not None
        return self._function(earlier, later)

    def prepare(self) -> None:
        """Do the work that is possible before the next image arrives, if there is any."""


class Streamed(Method):
    """Our stream: ``FlowEstimator`` with a fixed number of iterations, which has already seen the earlier image.

    :param runtime: the runtime that computes; it is ready before the first field.
    :ivar estimator: what computes.
    """

    is_stream = True

    def __init__(self, model: DEQFlow, iterations: int, runtime: str = "auto") -> None:
        super().__init__(iterations)
        settings: dict[str, Any] = {"max_iterations": iterations, "tolerance_px": None, "residual": False}
        self.estimator = FlowEstimator(model, runtime=runtime, **settings)

    def field(self, earlier: np.ndarray, later: np.ndarray, stamp_ns: int) -> np.ndarray | None:
        if self.estimator.reset_reason == "start":
            size = earlier.shape[0], earlier.shape[1]
            self.estimator.engine.make_ready(size, size)
            self.estimator.update(earlier, stamp_ns - 1)
            self.estimator.prepare()
        result = self.estimator.update(later, stamp_ns)
        self.stage_ms = {} if result is None else result.info.stage_ms
        return result.flow if result is not None and result.info.warm else None

    def prepare(self) -> None:
        self.estimator.prepare()


class Stateless(Method):
    """A network that keeps nothing from pair to pair."""

    def __init__(self, model: DEQFlow, iterations: int) -> None:
        super().__init__(iterations)
        self._model = model

    @torch.inference_mode()
    def field(self, earlier: np.ndarray, later: np.ndarray, stamp_ns: int) -> np.ndarray:
        clock = stage_times(self._model.device)
        with clock.stage("encode"):
            padding, first, second = padded_pair(earlier, later, self._model.device)
        flow = self.flow(first, second, clock)
        with clock.stage("output"):
            array = np.ascontiguousarray(to_array(crop(flow, padding)))
        self.stage_ms = clock.read()
        return array

    def flow(self, image1: Tensor, image2: Tensor, clock: StageTimes) -> Tensor:
        """(B, 2, H, W) px from images (B, 3, H, W) RGB 0..255, H and W multiples of 8."""
        raise NotImplementedError


class Unrolled(Stateless):
    """A recurrent network in the manner of RAFT, of our parts at their fastest: encode, start from zero, iterate."""

    def flow(self, image1: Tensor, image2: Tensor, clock: StageTimes) -> Tensor:
        model = self._model
        with clock.stage("encode"):
            features1, features2, context = _encode_pair(model, image1, image2, torch.channels_last)
            # Of the second image a pair takes the features alone.
            encoding1, encoding2 = Encoding(features1, context), Encoding(features2, context)
        with clock.stage("prepare"):
            prepared = model.prepare(encoding1)
        with clock.stage("correlate"):
            problem = model.problem(encoding1, encoding2, prepared, iterations=self.iterations)
        with clock.stage("solve"):
            state = model.initial_state(encoding1)
            for _ in range(self.iterations):
                state = problem(*state)
        with clock.stage("upsample"):
            return model.upsample(state)


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


class Pairwise(Stateless):
    """The stateless pairwise way in which the method's release works: a plain, independent form of the same function.

    The correlation is looked up by ``grid_sample`` level by level, the context convolved in every iteration, each gate
    is a convolution of its own, weight normalisation is computed anew in every call, batch norm not folded.

    :param model: from ``as_released``.
    """

    def flow(self, image1: Tensor, image2: Tensor, clock: StageTimes) -> Tensor:
        model, a = self._model, self._model.architecture
        with clock.stage("encode"):
            features1, features2, context = _encode_pair(model, image1, image2, torch.contiguous_format)
        with clock.stage("correlate"):
            pyramid = _pooled_volumes(features1, features2, a.correlation_levels)
        batch, _, height, width = context.shape
        with clock.stage("solve"), parametrize.cached():
            hidden = context.new_zeros(batch, a.hidden_dim, height, width)
            flow = context.new_zeros((batch, 2, height, width), dtype=torch.float32)
            attention = model.update_block.attention(context) if isinstance(model.update_block, GmaUpdate) else None
            for _ in range(self.iterations):
                correlation = _grid_sampled(pyramid, flow, a.correlation_radius).to(hidden.dtype)
                hidden, flow = _update(model, hidden, flow, correlation, context, attention)
        with clock.stage("upsample"):
            return model.upsample((hidden, flow))


def _encode_pair(
    model: DEQFlow, image1: Tensor, image2: Tensor, layout: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of both images, encoded as one batch where the encoder allows that, and the context of the first."""
    both = (2 * (torch.cat((image1, image2)) / 255) - 1).to(next(model.parameters()).dtype)
    both = both.contiguous(memory_format=layout)
    encoder = model.encoder
    if isinstance(encoder, SeparateEncoders):
        features, context = encoder.fnet(both), F.relu(encoder.cnet(both[: len(image1)]))
    else:
        # One trunk gives both; the context of image 2 comes along, 2 % of the work of this stage.
        features, context = encoder(both)
    features1, features2 = features.chunk(2)
    return features1, features2, context[: len(image1)]


def _pooled_volumes(features1: Tensor, features2: Tensor, levels: int) -> list[Tensor]:
    """Similarities of all positions, (B * H * W, 1, h, w) for each level, of half the size of the level before."""
    batch, channels, height, width = features1.shape
    volume = torch.matmul(features1.flatten(2).transpose(1, 2), features2.flatten(2)).float() / channels**0.5
    pyramid = [volume.view(batch * height * width, 1, height, width)]
    while len(pyramid) < levels and min(pyramid[-1].shape[-2:]) > 1:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    # Below one cell nothing is left to pool; what lies outside of a level counts as zero.
    missing = levels - len(pyramid)
    return pyramid + [torch.zeros_like(pyramid[-1][..., :1, :1])] * missing


def _grid_sampled(pyramid: list[Tensor], flow: Tensor, radius: int) -> Tensor:
    """Correlation around position + flow, (B, levels * (2 radius + 1)**2, H, W); the x offset is the outer index."""
    batch, _, height, width = flow.shape
    flow = flow.float()
    y, x = torch.meshgrid(
        torch.arange(height, device=flow.device), torch.arange(width, device=flow.device), indexing="ij"
    )
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
    model: DEQFlow, hidden: Tensor, flow: Tensor, correlation: Tensor, context: Tensor, attention: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One iteration in which nothing was computed beforehand."""
    block = model.update_block
    assert isinstance(block, (RaftUpdate, GmaUpdate))
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


def opencv() -> dict[str, FlowFunction]:
    """The classical methods of OpenCV, by name."""
    return {
        "Farneback": farneback,
        "DIS fast": dense_inverse_search(cv2.DISOPTICAL_FLOW_PRESET_FAST),
        "DIS medium": dense_inverse_search(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM),
    }
