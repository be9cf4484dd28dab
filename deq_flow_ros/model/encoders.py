# SPDX-License-Identifier: Apache-2.0
"""Encoders compute matching features and context of an image, at 1/8 of its size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")
Norm = Callable[[int], nn.Module]


def instance_norm(channels: int) -> nn.Module:
    """Instance norm without parameters, as one group per channel.

    Unlike ``nn.InstanceNorm2d``, it keeps the channels_last layout, and allows a single spatial position in training.
    """
    return nn.GroupNorm(channels, channels, affine=False)


class Encoding(NamedTuple):
    """An encoded frame. It contains everything that is needed of the first or of the second image of a pair.

    :ivar features: (B, C, H/8, W/8), for the correlation.
    :ivar context: (B, C', H/8, W/8), needed only of the image on whose pixels the flow is defined.
    """

    features: Tensor
    context: Tensor


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
        layers = (*self.layer1, *self.layer2, *self.layer3)
        features: Tensor = self.conv2(run(self, layers, image, recompute))
        return features


def run(encoder: nn.Module, layers: Iterable[nn.Module], image: Tensor, recompute: bool) -> Tensor:
    """The stem of an encoder, then its layers. With ``recompute``, only the input of each of them is stored."""

    def stem(image: Tensor) -> Tensor:
        return F.relu(encoder.norm1(encoder.conv1(image)), inplace=True)  # type: ignore[operator]

    parts: list[Callable[[Tensor], Tensor]] = [stem, *layers]
    for part in parts:
        image = recomputed(part, image, owner=encoder) if recompute else part(image)
    return image


def fold_batch_norm(encoder: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, in place. For inference, when the statistics are fixed."""
    for part in encoder.modules():
        children = dict(part.named_children())
        for name, norm in children.items():
            if isinstance(norm, nn.BatchNorm2d):
                before = "0" if isinstance(part, nn.Sequential) else name.replace("norm", "conv")
                convolution = children[before]
                assert isinstance(convolution, nn.Conv2d)
                setattr(part, before, fuse_conv_bn_eval(convolution, norm))
                setattr(part, name, nn.Identity())


class SeparateEncoders(nn.Module):
    """The encoders of the released models: ``fnet`` (instance norm) for features, ``cnet`` (batch norm) for context."""

    def __init__(self, feature_dim: int, context_dim: int) -> None:
        super().__init__()
        self.fnet = ResidualEncoder(feature_dim, instance_norm)
        self.cnet = ResidualEncoder(context_dim, nn.BatchNorm2d)

    def forward(self, image: Tensor, recompute: bool = False) -> Encoding:
        return Encoding(self.fnet(image, recompute), F.relu(self.cnet(image, recompute), inplace=True))


class SharedEncoder(nn.Module):
    """The encoder of ``nano``: one trunk for features and context, without a stage at half resolution.

    In the released ``tiny``, the two encoders take 85 % of the arithmetic, most of it at half resolution.
    """

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
        x = run(self, (*self.layer1, *self.layer2), image, recompute)
        return Encoding(self.features(x), F.relu(self.context(x), inplace=True))


def recomputed(function: Callable[..., Result], *inputs: Tensor, owner: nn.Module | None = None) -> Result:
    """``function(*inputs)``, storing only the inputs for the backward pass (arXiv 1604.06174).

    :param owner: the module that the function is, or is part of, if that has batch norms.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), nullcontext() if owner is None else _frozen_statistics(owner)

    result: Result = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep batch norms from updating their running statistics: a batch that runs twice must not count twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None  # not counted
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
