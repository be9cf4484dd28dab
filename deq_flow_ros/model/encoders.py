# SPDX-License-Identifier: Apache-2.0
"""Encoders compute matching features and context of an image, at 1/8 of its size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")
Norm = Callable[[int], nn.Module]
Layer = Callable[[Tensor], Tensor]


class Encoding(NamedTuple):
    """An encoded frame. It contains everything that is needed of the first or of the second image of a pair.

    :ivar features: (B, C, H/8, W/8), for the correlation.
    :ivar context: (B, C', H/8, W/8), needed only of the image on whose pixels the flow is defined.
    """

    features: Tensor
    context: Tensor


def instance_norm(channels: int) -> nn.Module:
    """Instance norm; unlike ``nn.InstanceNorm2d``, it keeps the layout channels_last and allows a single position."""
    return nn.GroupNorm(channels, channels, affine=False)


class ResidualBlock(nn.Module):
    """Twice conv3x3-norm-ReLU, plus a shortcut (a 1x1 convolution and norm if the stride or width changes)."""

    def __init__(self, in_channels: int, channels: int, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = norm(channels)
        self.norm2 = norm(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return F.relu((x if self.downsample is None else self.downsample(x)) + y, inplace=True)


class ResidualEncoder(nn.Module):
    """The encoder of the released models: three stages of two residual blocks, at 1/2, 1/4 and 1/8."""

    def __init__(self, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3)
        self.norm1 = norm(64)
        self.layer1 = nn.Sequential(ResidualBlock(64, 64, norm), ResidualBlock(64, 64, norm))
        self.layer2 = nn.Sequential(ResidualBlock(64, 96, norm, 2), ResidualBlock(96, 96, norm))
        self.layer3 = nn.Sequential(ResidualBlock(96, 128, norm, 2), ResidualBlock(128, 128, norm))
        self.conv2 = nn.Conv2d(128, out_channels, 1)

    def forward(self, image: Tensor, recompute: bool = False) -> Tensor:
        features: Tensor = self.conv2(_run(self, (*self.layer1, *self.layer2, *self.layer3), image, recompute))
        return features


class SeparateEncoders(nn.Module):
    """The encoders of the released models: ``fnet`` (instance norm) for features, ``cnet`` (batch norm) for context."""

    def __init__(self, feature_dim: int, context_dim: int) -> None:
        super().__init__()
        self.fnet = ResidualEncoder(feature_dim, instance_norm)
        self.cnet = ResidualEncoder(context_dim, nn.BatchNorm2d)

    def forward(self, image: Tensor, recompute: bool = False) -> Encoding:
        return Encoding(self.fnet(image, recompute), F.relu(self.cnet(image, recompute), inplace=True))


class SharedEncoder(nn.Module):
    """The encoder of ``nano``: one trunk for features and context, without a stage at half resolution."""

    def __init__(self, feature_dim: int, context_dim: int) -> None:
        super().__init__()
        stem, quarter, eighth, norm = 32, 48, 96, instance_norm
        self.conv1 = nn.Conv2d(3, stem, 7, 2, padding=3)
        self.norm1 = norm(stem)
        self.layer1 = nn.Sequential(ResidualBlock(stem, quarter, norm, 2), ResidualBlock(quarter, quarter, norm))
        self.layer2 = nn.Sequential(ResidualBlock(quarter, eighth, norm, 2), ResidualBlock(eighth, eighth, norm))
        self.features = nn.Conv2d(eighth, feature_dim, 1)
        self.context = nn.Conv2d(eighth, context_dim, 3, padding=1)

    def forward(self, image: Tensor, recompute: bool = False) -> Encoding:
        x = _run(self, (*self.layer1, *self.layer2), image, recompute)
        return Encoding(self.features(x), F.relu(self.context(x), inplace=True))


ENCODERS: dict[str, type[nn.Module]] = {"separate": SeparateEncoders, "shared": SharedEncoder}


def _run(encoder: nn.Module, layers: Iterable[Layer], image: Tensor, recompute: bool) -> Tensor:
    """The stem of an encoder, then its layers. With ``recompute``, only the input of each of them is stored."""

    def stem(image: Tensor) -> Tensor:
        return F.relu(encoder.norm1(encoder.conv1(image)), inplace=True)  # type: ignore[operator]

    for part in (stem, *layers):
        image = recomputed(part, image, owner=encoder) if recompute else part(image)
    return image


def fold_batch_norm(encoder: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, in place. For inference, when the statistics are fixed."""
    for part in encoder.modules():
        for name, norm in list(part.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                before = "0" if isinstance(part, nn.Sequential) else name.replace("norm", "conv")
                setattr(part, before, fuse_conv_bn_eval(getattr(part, before), norm))
                setattr(part, name, nn.Identity())


def recomputed(function: Callable[..., Result], *inputs: Tensor, owner: nn.Module | None = None) -> Result:
    """``function(*inputs)``, storing only the inputs for the backward pass (arXiv 1604.06174).

    :param owner: the module that the function is, or is part of, if that has batch norms.
    """
    result: Result = checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _frozen_statistics(owner)),
    )  # fmt: skip
    return result


@contextmanager
def _frozen_statistics(owner: nn.Module | None) -> Iterator[None]:
    """Keep batch norms from updating their running statistics: a batch that runs twice must not count twice."""
    modules = () if owner is None else owner.modules()
    norms = [m for m in modules if isinstance(m, nn.BatchNorm2d) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


# The encoder of 8-bit integers. Its values are 0, 1, ..., 255 times a step: they are behind a ReLU, thus not negative.
STEPS = 255
# Largest value behind the stem, and in each block behind its first norm and behind its sum. In the fourteen pairs
# (docs/datasets.md), about 1 of 5,000 values is larger.
STEM_LIMIT, NORM_LIMITS, SUM_LIMITS = 8.0, (7.0, 7.0, 6.0, 4.5), (9.0, 12.0, 6.0, 7.0)
# The pixel that is 0 for the network, and the step between two pixels. It is 127.5 in truth. Instance norm removes the
# difference, except where a window reaches beyond the border.
GREY, PIXEL = 128, 2 / 255


class Int8Encoder(nn.Module):
    """The shared encoder with convolutions of 8-bit integers, for processors with instructions for them (VNNI).

    Instance norm makes the variance of the values between the layers 1 for all images, so fixed limits serve instead of
    a calibration. Norms and sums are float32, and weights have a scale per output channel, see Krishnamoorthi,
    "Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342.

    :param dtype: of features and context.
    :raises ValueError: for an encoder of another kind.
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        if not isinstance(encoder, SharedEncoder):
            raise ValueError("int8 is for models with a shared encoder (nano); expected another precision for this one")
        self._stem = _int8_convolution(encoder.conv1, PIXEL, zero=GREY)
        self._blocks: list[tuple[Layer, float, Layer, Layer | None, float]] = []
        step = STEM_LIMIT / STEPS
        blocks = [part for part in (*encoder.layer1, *encoder.layer2) if isinstance(part, ResidualBlock)]
        for block, limit, sum_limit in zip(blocks, NORM_LIMITS, SUM_LIMITS, strict=True):
            first, second = _int8_convolution(block.conv1, step), _int8_convolution(block.conv2, limit / STEPS)
            projection: Any = None if block.downsample is None else block.downsample[0]
            shortcut = None if projection is None else _int8_convolution(projection, step)
            self._blocks.append((first, limit, second, shortcut, sum_limit))
            step = sum_limit / STEPS
        self._features = _int8_convolution(encoder.features, step, dtype)
        self._context = _int8_convolution(encoder.context, step, dtype, after="relu")

    def forward(self, image: Tensor, recompute: bool = False) -> Encoding:
        """Encode an image, (B, 3, H, W) RGB 0..255, rounded if it is not uint8. There is nothing to recompute."""
        pixels = image if image.dtype == torch.uint8 else image.round().to(torch.uint8)
        x = _normed(self._stem(pixels.contiguous(memory_format=torch.channels_last)), STEM_LIMIT)
        exact = torch.empty(0)  # x before it was rounded; the first block does not ask for it
        for first, limit, second, shortcut, sum_limit in self._blocks:
            y = _norm(second(_normed(first(x), limit))).relu_()
            exact = y.add_(exact) if shortcut is None else _norm(shortcut(x)).add_(y).relu_()
            x = _to_bytes((exact * (STEPS / sum_limit)).sub_(128))
        return Encoding(self._features(x), self._context(x))


def _int8_convolution(
    convolution: nn.Conv2d, step: float, dtype: torch.dtype = torch.float32, zero: int = 0, after: str = "none"
) -> Layer:
    """A convolution of uint8 (B, C, H, W), whose numbers are steps from ``zero``, with int8 weights, by oneDNN."""
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
    settings: tuple[Any, ...] = (step, zero, packed, scale, zeros, bias, *shape, 1.0, 0, dtype, after, [], "")
    return lambda x: torch.ops.onednn.qconv2d_pointwise(x, *settings)


def _norm(x: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1])


def _normed(x: Tensor, limit: float) -> Tensor:
    """Instance norm, ReLU, and rounding; the first two with the scale of the last in one pass."""
    channels = x.shape[1]
    return _to_bytes(F.group_norm(x, channels, x.new_full((channels,), STEPS / limit), x.new_full((channels,), -128.0)))


def _to_bytes(x: Tensor) -> Tensor:
    """Values of -128..127 as uint8 of 0..255, others at the nearest of these; ``x`` is written over."""
    # By way of int8: PyTorch converts float32 to it with vector instructions, and to uint8 six times more slowly.
    return x.clamp_(-128, 127).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
