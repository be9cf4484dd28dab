# SPDX-License-Identifier: Apache-2.0
"""The shared encoder with convolutions of 8-bit integers, for processors with instructions for them (VNNI).

Instance norm makes the variance of the values between the layers 1 for all images, so fixed limits serve instead of a
calibration. Norms and sums are float32, and weights have a scale per output channel, see Krishnamoorthi, "Quantizing
deep convolutional networks for efficient inference", arXiv 1806.08342. The convolutions are those of oneDNN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_flow_ros.model.encoders import Encoding, ResidualBlock, SharedEncoder

STEPS = 255
"""Values are 0, 1, ..., 255 times a step: they are behind a ReLU, thus not negative."""
STEM_LIMIT, NORM_LIMITS, SUM_LIMITS = 8.0, (7.0, 7.0, 6.0, 4.5), (9.0, 12.0, 6.0, 7.0)
"""Largest value behind the stem, and in each block behind its first norm and behind its sum. In the fourteen pairs
(docs/datasets.md), about 1 of 5,000 values is larger."""
GREY, PIXEL = 128, 2 / 255
"""The pixel that is 0 for the network, and the step between two pixels. It is 127.5 in truth. Instance norm removes
the difference, except where a window reaches beyond the border."""


class _Convolution:
    """A convolution of uint8 (B, C, H, W) with int8 weights.

    :param step: the value of a 1 in its input.
    :param zero: the input that is the value 0.
    :param relu: whether values below 0 become 0.
    """

    def __init__(
        self, convolution: nn.Conv2d, step: float, dtype: torch.dtype = torch.float32, zero: int = 0, relu: bool = False
    ) -> None:
        weight = convolution.weight.float()
        scale = (weight.abs().amax((1, 2, 3)) / 127).clamp_min(1e-12)
        rounded = (weight / scale[:, None, None, None]).round().to(torch.int8)
        stride, padding = list(convolution.stride), [int(side) for side in convolution.padding]
        shape = stride, padding, list(convolution.dilation), convolution.groups
        # The layout of the packed weights depends on the size of the input; that of a usual image serves well for all.
        usual = [1, weight.shape[1], 120, 160]
        packed = torch.ops.onednn.qconv_prepack(rounded, scale, step, zero, *shape, usual)
        zeros = torch.zeros_like(scale, dtype=torch.int64)
        bias = None if convolution.bias is None else convolution.bias.float()
        self._input = step, zero
        after = "relu" if relu else "none"
        self._settings: tuple[Any, ...] = (packed, scale, zeros, bias, *shape, 1.0, 0, dtype, after, [], "")

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(x, *self._input, *self._settings)
        return result


class Int8Encoder(nn.Module):
    """See the module.

    :param encoder: with float32 weights.
    :param dtype: of features and context.
    :raises ValueError: for an encoder of another kind.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        if not isinstance(encoder, SharedEncoder):
            raise ValueError("int8 is for models with a shared encoder (nano); expected another precision for this one")
        self._stem = _Convolution(encoder.conv1, PIXEL, zero=GREY)
        self._blocks: list[tuple[_Convolution, float, _Convolution, _Convolution | None, float]] = []
        step = STEM_LIMIT / STEPS
        blocks = [part for part in (*encoder.layer1, *encoder.layer2) if isinstance(part, ResidualBlock)]
        for block, limit, sum_limit in zip(blocks, NORM_LIMITS, SUM_LIMITS, strict=True):
            first, second = _Convolution(block.conv1, step), _Convolution(block.conv2, limit / STEPS)
            shortcut = None if block.downsample is None else _Convolution(block.downsample[0], step)  # type: ignore[arg-type]
            self._blocks.append((first, limit, second, shortcut, sum_limit))
            step = sum_limit / STEPS
        self._features = _Convolution(encoder.features, step, dtype)
        self._context = _Convolution(encoder.context, step, dtype, relu=True)

    def forward(self, image: Tensor, recompute: bool = False) -> Encoding:
        """Encode an image.

        :param image: (B, 3, H, W) RGB 0..255; anything but uint8 is rounded.
        :param recompute: has no effect, as there are no gradients.
        """
        pixels = image if image.dtype == torch.uint8 else image.round().to(torch.uint8)
        x = _normed(self._stem(pixels.contiguous(memory_format=torch.channels_last)), STEM_LIMIT)
        exact = torch.empty(0)  # x before it was rounded; the first block does not ask for it
        for first, limit, second, shortcut, sum_limit in self._blocks:
            y = _norm(second(_normed(first(x), limit))).relu_()
            exact = y.add_(exact) if shortcut is None else _norm(shortcut(x)).add_(y).relu_()
            x = _to_bytes((exact * (STEPS / sum_limit)).sub_(128))
        return Encoding(self._features(x), self._context(x))


def _norm(x: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1])


def _normed(x: Tensor, limit: float) -> Tensor:
    """Instance norm, ReLU, and rounding; the first two with the scale of the last in one pass."""
    channels = x.shape[1]
    return _to_bytes(F.group_norm(x, channels, x.new_full((channels,), STEPS / limit), x.new_full((channels,), -128.0)))


def _to_bytes(x: Tensor) -> Tensor:
    """Values of -128..127 as uint8 of 0..255, others at the nearest of these; ``x`` is written over.

    By way of int8: PyTorch converts float32 to it with vector instructions, and to uint8 six times more slowly.
    """
    return x.clamp_(-128, 127).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
