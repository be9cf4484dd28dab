# SPDX-License-Identifier: Apache-2.0
"""The lookup of correlation: its values, and that all ways to them agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deq_flow_ros.model import DEQFlow, correlation
from deq_flow_ros.model.correlation import CorrelationPyramid, MixedCorrelation, OnDemandCorrelation, correlate


@pytest.mark.parametrize("kind", [CorrelationPyramid, OnDemandCorrelation])
def test_lookup_equals_grid_sample(kind: type[CorrelationPyramid] | type[OnDemandCorrelation]) -> None:
    """Why: the fast lookups must give bilinear samples with zeros outside, far outside included, x offset outermost."""
    torch.manual_seed(0)
    f1, f2 = torch.randn(2, 8, 9, 12), torch.randn(2, 8, 9, 12)
    flow = 6 * torch.randn(2, 2, 9, 12)
    flow[0, :, 0, 0] = torch.tensor([1e6, -1e6])
    got = kind(f1, f2, levels=3, radius=2).lookup(flow)
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    expected, pooled = [], f2
    for level in range(3):
        pooled = pooled if level == 0 else F.avg_pool2d(pooled, 2)
        height, width = pooled.shape[-2:]
        volume = torch.einsum("bcij,bchw->bijhw", f1, pooled).reshape(-1, 1, height, width) / 8**0.5
        centre = (torch.stack((x, y)) + flow).permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) / 2**level
        offset = torch.arange(-2.0, 3.0)
        grid = centre + torch.stack(torch.meshgrid(offset, offset, indexing="ij"), -1)  # [x offset, y offset]
        grid = 2 * (grid + 0.5) / torch.tensor([width, height]) - 1
        sampled = F.grid_sample(volume, grid.clamp(-1e4, 1e4), align_corners=False)
        expected.append(sampled.view(2, 9, 12, 25))
    torch.testing.assert_close(got, torch.cat(expected, -1).permute(0, 3, 1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(40, 48), (5, 33), (1, 1), (2, 3)])
def test_lookups_of_all_kinds_are_the_same(size: tuple[int, int]) -> None:
    """Why: which kind serves depends on speed alone, on maps too small for all levels as well."""
    f1, f2 = torch.randn(2, 2, 24, *size, generator=torch.Generator().manual_seed(0)).unbind()
    flow = 9 * torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))
    expected = CorrelationPyramid(f1, f2, 4, 3).lookup(flow)
    kinds = [OnDemandCorrelation(f1, f2, 4, 3)]
    if min(size) > 1:
        kinds.append(MixedCorrelation(f1, f2, 4, 3, 1))
    for kind in kinds:
        got = kind.lookup(flow)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_kinds_agree_in_half_precision(dtype: torch.dtype) -> None:
    """Why: another number of iterations, or size, must not change the flow; products that were rounded in one kind
    alone once moved it by 0.03 px. Kinds differ in the order of adding in float32, which tips few products to their
    neighbour."""
    f1, f2 = torch.randn(2, 2, 96, 15, 20, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    flow = 3 * torch.randn(2, 2, 15, 20, generator=torch.Generator().manual_seed(1))
    expected = CorrelationPyramid(f1, f2, 4, 3).lookup(flow)
    for got in (OnDemandCorrelation(f1, f2, 4, 3).lookup(flow), MixedCorrelation(f1, f2, 4, 3, 2).lookup(flow)):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, atol=torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
        assert (got != expected).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_all_kinds_differ_only_where_float32_leaves_it_open(dtype: torch.dtype) -> None:
    """Why: this is what "the same" can mean at best. A product may be rounded to one neighbour or the other only if
    its exact value is half-way between them, to within the rounding of float32."""
    f1, f2 = torch.randn(2, 1, 96, 30, 40, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    still = torch.zeros(1, 2, 30, 40)  # of neighbours at whole numbers nothing is interpolated
    volume, on_demand_ = (
        kind(f1, f2, 1, 3).lookup(still).double() for kind in (CorrelationPyramid, OnDemandCorrelation)
    )
    exact = CorrelationPyramid((f1 / 96**0.5).double() * 96**0.5, f2.double(), 1, 3).lookup(still)
    differing = volume != on_demand_
    assert 0 < differing.sum() < 1e-3 * differing.numel()
    half_way = (volume + on_demand_)[differing] / 2
    torch.testing.assert_close(exact[differing], half_way, rtol=0, atol=2e-6)


def test_gathered_products_are_the_sampled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a GPU gathers, a few cells at a time, where a CPU samples a sparse product; a model moves between them."""
    monkeypatch.setattr(correlation, "CELLS_AT_ONCE", 7)
    sources, targets = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(0)).unbind()
    index = torch.randint(30, (30, 50), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    expected = (sources @ targets.t()).gather(1, index.long())
    for products in (correlation._sampled_products, correlation._gathered_products, correlation._fused_products):
        torch.testing.assert_close(products(sources, targets, index), expected, atol=1e-5, rtol=1e-5)


def test_autocast_leaves_both_kinds_of_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: callers may run the model under autocast; products in bfloat16 would not go with fractions in float32."""
    features = torch.randn(1, 24, 9, 12, generator=torch.Generator().manual_seed(0))
    flow = 2 * torch.randn(1, 2, 9, 12, generator=torch.Generator().manual_seed(1))
    expected = OnDemandCorrelation(features, features, 4, 3).lookup(flow)
    for products in (correlation._sampled_products, correlation._gathered_products):
        monkeypatch.setattr(correlation, "_sampled_products", products)  # the one of the CPU
        with torch.autocast("cpu", torch.bfloat16):
            got = OnDemandCorrelation(features, features, 4, 3).lookup(flow)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_gradients_on_demand_are_refused() -> None:
    """Why: what PyTorch says of it names an operation deep inside, and nothing that the caller could change."""
    nano, image = DEQFlow("nano").eval(), torch.rand(1, 3, 480, 640)
    encoding = nano.encode(image)
    assert encoding.features.requires_grad
    with pytest.raises(ValueError, match=r"leave out the number of iterations \(None\)"):
        nano.problem(encoding, encoding, iterations=1)
    with torch.no_grad():
        nano.problem(encoding, encoding, iterations=1)


def test_what_is_kept_of_a_size_serves_inside_and_outside_of_inference_mode() -> None:
    """Why: PyTorch saves no tensor of inference mode for a backward pass, and a notebook does both in turn."""
    features, flow = torch.randn(1, 8, 11, 13), torch.randn(1, 2, 11, 13)
    with torch.inference_mode():
        expected = OnDemandCorrelation(features, features, 3, 2).lookup(flow)
    got = OnDemandCorrelation(features, features, 3, 2).lookup(flow.requires_grad_())
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got.sum(), flow)
    assert gradient.isfinite().all() and gradient.any()


def test_what_is_not_finite_stays_with_its_cell() -> None:
    """Why: the solver finds a diverged sample by its values; the others of the batch must not be touched by it."""
    features = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(2, 2, 16, 16)
    flow[1, :, 0, 0] = torch.tensor([torch.nan, torch.inf])
    for kind in (CorrelationPyramid, OnDemandCorrelation):
        finite = kind(features, features, 4, 3).lookup(flow).isfinite().all(1)
        assert not finite[1, 0, 0] and finite.sum() == finite.numel() - 1


def test_all_pairs_are_correlated_where_it_pays_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: few iterations do not earn the work of all pairs back, large images have no room for them, training needs
    them."""
    features = torch.randn(1, 96, 60, 80)
    assert isinstance(correlate(features, features, 4, 3, iterations=4), OnDemandCorrelation)
    assert isinstance(correlate(features, features, 4, 3, iterations=60), CorrelationPyramid)
    assert isinstance(correlate(features, features, 4, 3), CorrelationPyramid)
    monkeypatch.setattr(correlation, "MAX_VOLUME_BYTES", 1 << 20)
    assert isinstance(correlate(features, features, 4, 3, iterations=60), OnDemandCorrelation)


def test_a_large_image_on_a_gpu_has_the_volume_of_its_coarse_levels_alone() -> None:
    """Why: of 1920x1080 all pairs take 2.8 GB in half precision, and looking all up on demand takes ten times as long.

    Nothing is computed: tensors without values choose as those of a GPU do.
    """
    with torch.device("meta"):
        features = torch.empty(1, 96, 135, 240, dtype=torch.float16)
        mixed = correlate(features, features, 4, 3, iterations=4)
        assert isinstance(mixed, MixedCorrelation)
        assert sum(volume.nbytes for volume in mixed.coarse.volumes) == sum(
            2 * 135 * 240 * (135 >> level) * (240 >> level) for level in (1, 2, 3)
        )
        small = torch.empty(1, 96, 60, 80, dtype=torch.float16)
        assert isinstance(correlate(small, small, 4, 3, iterations=4), CorrelationPyramid)
