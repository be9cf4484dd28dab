# SPDX-License-Identifier: Apache-2.0
"""``DEQFlow`` computes the flow of an image pair as the fixed point of an update operator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_flow_ros.equilibrium import Solution, Solver, State, StopReason, solve
from deq_flow_ros.model import cells
from deq_flow_ros.model.architecture import SIZES, Architecture
from deq_flow_ros.model.cells import FACTOR, crop, pad_to_multiple, rescale
from deq_flow_ros.model.correlation import Correlation, CorrelationPyramid, correlate
from deq_flow_ros.model.encoders import ENCODERS, Encoding, Int8Encoder, fold_batch_norm, recomputed
from deq_flow_ros.model.update import Prepared, UpdateOperator, make_update_operator
from deq_flow_ros.model.weight_norm import fold_weight_norm

MIN_SIDE = 16
MIN_COARSE_SIDE = 64
# Largest image for inference in a few GB; the second holds for operators that store something for all pairs of cells.
MAX_PIXELS, MAX_PIXELS_ALL_PAIRS = 1 << 22, 1 << 20


def update_px(z: State, fz: State) -> Tensor:
    """RMS length of the flow update in pixels of the full resolution, (B,). Solves stop on this measure."""
    return FACTOR * (fz[1] - z[1]).float().square().sum(1).mean((1, 2)).sqrt()


@dataclass(frozen=True)
class Prediction:
    """The result of ``DEQFlow.forward``.

    :ivar flow: (B, 2, H, W) px, x before y: from ``image1`` to ``image2``, on the pixels of ``image1``.
    :ivar residual: (B, 1, H, W) px, the length of the last update of each pixel, small where the iteration has settled.
    :ivar uncertainty: (B, 1, H, W) px, the expected endpoint error of each pixel; None if the weights have no head.
    :ivar state: (hidden, flow at 1/8), from which the next solve can start.
    :ivar iterations: (B,) the number of evaluations of the update operator; ``stop_reasons`` says why not more.
    :ivar residual_px: (B,) the RMS of the last update, px.
    """

    flow: Tensor
    residual: Tensor
    uncertainty: Tensor | None
    state: State
    iterations: Tensor
    residual_px: Tensor
    stop_reasons: tuple[StopReason, ...]


@dataclass(eq=False)
class FlowProblem:
    """``f(hidden, flow) -> (hidden, flow)`` for one pair of images, made by ``DEQFlow.problem``."""

    update: UpdateOperator
    correlation: Correlation
    prepared: Prepared
    recompute: bool

    def __call__(self, hidden: Tensor, flow: Tensor) -> State:
        lookup = self.correlation.lookup
        if self.recompute and torch.is_grad_enabled() and isinstance(self.correlation, CorrelationPyramid):
            # The volumes are inputs as well, so that everything stored for the backward pass is accounted for.
            correlation = recomputed(lambda flow, *_: lookup(flow), flow, *self.correlation.volumes)
        else:
            correlation = lookup(flow)
        return self.update(hidden, flow, correlation.to(hidden.dtype), self.prepared)


class DEQFlow(nn.Module):
    """Deep equilibrium optical flow (arXiv 2204.08442).

    :param architecture: the name of a size ("nano", "base", ...) or an ``Architecture``, as
        ``dataclasses.replace(SIZES["base"], update="gma", weight_norm=True)``.
    :ivar uncertainty: the head that predicts how wrong the flow is; None if ``uncertainty_dim`` is 0.
    :raises ValueError: for an unknown size, encoder or update operator.
    """

    def __init__(self, architecture: str | Architecture = "nano") -> None:
        super().__init__()
        if isinstance(architecture, str):
            if architecture not in SIZES:
                raise ValueError(f"unknown model size {architecture!r}; expected one of {', '.join(SIZES)}")
            architecture = SIZES[architecture]
        a = self.architecture = architecture
        if a.encoder not in ENCODERS:
            raise ValueError(f"unknown encoder {a.encoder!r}; expected one of {', '.join(ENCODERS)}")
        self.encoder = ENCODERS[a.encoder](a.feature_dim, a.context_dim)
        self.update_block = make_update_operator(a)
        first, last = nn.Conv2d(a.hidden_dim, a.mask_dim, 3, padding=1), nn.Conv2d(a.mask_dim, 9 * FACTOR**2, 1)
        self.mask = nn.Sequential(first, nn.ReLU(inplace=True), last)
        self.uncertainty = cells.UncertaintyHead(a.hidden_dim, a.uncertainty_dim) if a.uncertainty_dim else None
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def max_pixels(self) -> int:
        """The largest number of pixels at which a stream should process its images, because memory grows with it."""
        return MAX_PIXELS_ALL_PAIRS if getattr(self.update_block, "all_pairs", False) else MAX_PIXELS

    def folded(self) -> DEQFlow:
        """The same function for inference, with weight norm and batch norm folded into the convolutions.

        Returns a new model, or this one if it has neither. In training mode batch norm stays, as it uses the batch.
        """
        batch_norm = not self.training and any(isinstance(module, nn.BatchNorm2d) for module in self.modules())
        if not (self.architecture.weight_norm or batch_norm):
            return self
        # In place, it would break every copy of the module, such as that of averaged weights: PyTorch lets copies share
        # a class, which it changes when a parametrisation is removed.
        model = DEQFlow(replace(self.architecture, weight_norm=False)).train(self.training)
        model.load_state_dict(fold_weight_norm(self.state_dict()))
        if batch_norm:
            fold_batch_norm(model.encoder)
        return model.to(next(self.parameters()))

    def encode(self, image: Tensor, recompute: bool = False) -> Encoding:
        """Encode an image. The result contains everything that it contributes to any pair.

        :param image: (B, 3, H, W) RGB 0..255, uint8 or float, H and W multiples of 8.
        :param recompute: whether to run each block again in the backward pass, which saves memory in training.
        """
        if not isinstance(self.encoder, Int8Encoder):  # which takes pixels as they are
            image = (image - 127.5).mul_(2 / 255).to(next(self.parameters()))
            image = image.contiguous(memory_format=torch.channels_last)
        return self.encoder(image, recompute)  # type: ignore[no-any-return]

    def prepare(self, encoding1: Encoding) -> Prepared:
        """Compute the part of ``problem`` that needs only the image on whose pixels the flow is defined."""
        return self.update_block.prepare(encoding1.context)

    def problem(
        self, encoding1: Encoding, encoding2: Encoding, prepared: Prepared | None = None, recompute: bool = False,
        iterations: int | None = None,
    ) -> FlowProblem:  # fmt: skip
        """The function whose fixed point is the flow from image 1 to image 2, on the pixels of image 1.

        :param prepared: ``prepare(encoding1)``, if it was computed ahead.
        :param recompute: whether to look up the correlation again in the backward pass, which saves memory in training.
        :param iterations: see ``correlate``; if it is given, the encodings must not require gradients.
        """
        a, maps = self.architecture, (encoding1.features, encoding2.features)
        correlation = correlate(*maps, a.correlation_levels, a.correlation_radius, iterations)
        prepared = self.prepare(encoding1) if prepared is None else prepared
        return FlowProblem(self.update_block, correlation, prepared, recompute)

    def initial_state(self, encoding: Encoding) -> State:
        """The cold start, whose hidden state and flow are zero."""
        batch, _, height, width = encoding.context.shape
        hidden = encoding.context.new_zeros(batch, self.architecture.hidden_dim, height, width)
        flow = encoding.context.new_zeros((batch, 2, height, width), dtype=torch.float32)
        return hidden.contiguous(memory_format=torch.channels_last), flow

    def coarse_start(
        self, image1: Tensor, image2: Tensor, levels: int, iterations: int, solver: str | Solver = "picard",
        watch: bool = True,
    ) -> State | None:  # fmt: skip
        """A coarse-to-fine start for a cold pair. Smaller versions of the pair are solved, each from the one before.

        One iteration moves the flow by at most what the lookup can see, which in a smaller image is a larger motion.

        :param image1: (B, 3, H, W) RGB 0..255, H and W multiples of 8.
        :param levels: the smallest version is ``2**levels`` times smaller; ``usable_levels`` at most.
        :param iterations: per level; ``watch`` is that of ``solve``.
        :returns: a state of the images' own size; None for no levels.
        """
        height, width = image1.shape[-2:]
        state = None
        for level in range(levels, 0, -1):
            size = (height >> level, width >> level)
            smaller = (F.interpolate(image.float(), size, mode="area") for image in (image1, image2))
            encoding1, encoding2 = (self.encode(pad_to_multiple(image)[0]) for image in smaller)
            grid = encoding1.context.shape[-2:]
            state = self.initial_state(encoding1) if state is None else rescale(state, grid, 2)
            # Whoever starts from the result checks it; here the check would make the host wait at every level.
            f = self.problem(encoding1, encoding2, iterations=iterations)
            state = solve(f, state, solver=solver, max_iterations=iterations, check_start=False, watch=watch).state
        return None if state is None else rescale(state, (height // FACTOR, width // FACTOR), 2)

    def upsample(self, state: State) -> Tensor:
        """The flow of a state at full resolution, (B, 2, H, W) px."""
        hidden, flow = state
        # The released models scale the logits by this factor to balance gradients, so their weights require it.
        return cells.convex_upsample(flow, self.mask(hidden).float().mul_(0.25))

    def upsample_residual(self, solution: Solution) -> Tensor:
        """The length of the last update of each pixel, (B, 1, H, W) px; NaN if no iteration was made."""
        update = FACTOR * torch.hypot(*(solution.state[1] - solution.previous[1]).split(1, 1))
        update = update.masked_fill((solution.iterations == 0).view(-1, 1, 1, 1), torch.nan)
        return F.interpolate(update, scale_factor=FACTOR, mode="bilinear", align_corners=False)

    def upsample_uncertainty(self, state: State) -> Tensor | None:
        """The expected endpoint error of a state's flow at full resolution, (B, 1, H, W) px; None without the head."""
        return None if self.uncertainty is None else cells.expected_error(self.uncertainty(state[0]))

    @torch.inference_mode()
    def forward(
        self, image1: Tensor, image2: Tensor, max_iterations: int = 12, solver: str | Solver = "picard",
        tolerance_px: float | None = None, state: State | None = None, coarse_levels: int = 0,
    ) -> Prediction:  # fmt: skip
        """Compute the flow from ``image1`` to ``image2``.

        :param image1: (B, 3, H, W) RGB 0..255, uint8 or float, H, W >= 16; ``image2`` likewise.
        :param max_iterations: the largest number of evaluations of the update operator.
        :param solver: a name, or a solver with settings of its own, such as ``Anderson(window=3)``.
        :param tolerance_px: a sample stops when the RMS update of its flow is at or below this; None: never.
        :param state: the start, from ``Prediction.state`` of images of the same size; None starts cold.
        :param coarse_levels: the number of smaller resolutions, of at least 64 px, that a cold start solves first, see
            ``coarse_start``. All levels share ``max_iterations`` evenly.
        :raises ValueError: for malformed images, a state that does not fit them, or impossible settings.
        :raises FloatingPointError: if images or weights are not finite.
        """
        for name, image in (("image1", image1), ("image2", image2)):
            shape = tuple(image.shape)
            if len(shape) != 4 or shape[0] < 1 or shape[1] != 3 or min(shape[2:]) < MIN_SIDE:
                raise ValueError(f"{name} must be (B, 3, H, W), at least {MIN_SIDE}x{MIN_SIDE} px, got shape {shape}")
        if image1.shape != image2.shape:
            raise ValueError(f"the images must have one shape, got {tuple(image1.shape)} and {tuple(image2.shape)}")
        if max_iterations < 1 or coarse_levels < 0:
            raise ValueError(f"expected max_iterations >= 1, coarse_levels >= 0, got {max_iterations}, {coarse_levels}")
        padded1, padding = pad_to_multiple(image1.to(self.device, torch.float32))
        padded2, _ = pad_to_multiple(image2.to(self.device, torch.float32))
        encoding1, encoding2 = self.encode(padded1), self.encode(padded2)
        start = self.initial_state(encoding1)
        if state is None:
            levels = min(coarse_levels, usable_levels(*padded1.shape[-2:]), max_iterations - 1)
            share = max_iterations // (levels + 1)
            start = self.coarse_start(padded1, padded2, levels, share, solver) or start
            max_iterations -= levels * share
        else:
            expected, got_shapes = ([tuple(part.shape) for part in each] for each in (start, state))
            if got_shapes != expected:
                raise ValueError(f"the start state does not fit the images: expected {expected}, got {got_shapes}")
            start = state
        problem = self.problem(encoding1, encoding2, iterations=max_iterations)
        solution = solve(
            problem, start, solver=solver, max_iterations=max_iterations, tolerance=tolerance_px, measure=update_px
        )
        uncertainty = self.upsample_uncertainty(solution.state)
        return Prediction(
            flow=crop(self.upsample(solution.state), padding),
            residual=crop(self.upsample_residual(solution), padding),
            uncertainty=None if uncertainty is None else crop(uncertainty, padding),
            state=solution.state, iterations=solution.iterations, residual_px=solution.residual,
            stop_reasons=solution.stop_reasons,
        )  # fmt: skip


def usable_levels(height: int, width: int) -> int:
    """How many times an image can be halved for ``coarse_start`` and still be large enough."""
    return max(0, (min(height, width) // MIN_COARSE_SIDE).bit_length() - 1)
