"""g-SNR on numbers worked out by hand, and its moments against torch on sizes that need several chunks."""

from __future__ import annotations

import math

import pytest
import torch

from hf_sai.optim import gradient_moments, gradient_snr, gsnr
from hf_sai.optim.gsnr import CHUNK_NUMEL, fallback_snr


def test_hand_computed_gradient():
    # mean 0, squares 9 + 16 + 9 + 16 = 50, std = sqrt(50 / 3)
    (moments,) = gradient_moments([torch.tensor([3.0, 4.0, -3.0, -4.0])])
    assert moments.mean == 0.0
    assert moments.norm == pytest.approx(math.sqrt(50), rel=1e-15)
    assert moments.std == pytest.approx(math.sqrt(50 / 3), rel=1e-15)
    assert gradient_snr(moments, eps=0.0) == pytest.approx(math.sqrt(3), rel=1e-15)


def test_eps_enters_down_to_the_least_that_the_ratio_can_be():
    # 1, 2, 3: norm sqrt(14), std 1, least sqrt(2)
    (moments,) = gradient_moments([torch.tensor([1.0, 2.0, 3.0])])
    assert gradient_snr(moments, eps=0.5) == pytest.approx(math.sqrt(14) / 1.5, rel=1e-15)
    assert gradient_snr(moments, eps=100.0) == math.sqrt(2)


def test_mean_enters_through_the_norm():
    # 1, 2, 3: norm sqrt(14), std 1
    (moments,) = gradient_moments([torch.tensor([[1.0], [2.0], [3.0]])])
    assert gradient_snr(moments, eps=0.0) == pytest.approx(math.sqrt(14), rel=1e-15)


@pytest.mark.parametrize("numel", [CHUNK_NUMEL - 1, CHUNK_NUMEL, CHUNK_NUMEL + 1, 3 * CHUNK_NUMEL + 17])
def test_chunks_combine_to_the_whole(numel):
    gradient = torch.randn(numel) * 3 + torch.arange(numel) / numel  # the mean differs from chunk to chunk
    (moments,) = gradient_moments([gradient])
    exact = gradient.double()
    assert moments.count == numel
    assert moments.norm == pytest.approx(exact.norm().item(), rel=1e-12)
    assert moments.std == pytest.approx(exact.std().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_high(dtype):
    gradient = (torch.randn(300, 70) + 0.5).to(dtype)
    (moments,) = gradient_moments([gradient])
    assert moments.std == pytest.approx(gradient.double().std().item(), rel=1e-12)
    assert moments.mean == pytest.approx(gradient.double().mean().item(), rel=1e-12)


def test_non_contiguous_and_expanded_gradients():
    base = torch.randn(40, 30)
    transposed, expanded = gradient_moments([base.t()[::2], base[:1].expand(5, 30)])
    assert transposed.norm == pytest.approx(base.t()[::2].double().norm().item(), rel=1e-12)
    assert expanded.count == 150
    assert expanded.std == pytest.approx(base[:1].expand(5, 30).double().std().item(), rel=1e-12)


@pytest.mark.parametrize("value", [0.1, 1.0, -3.3e-12, 7e20])
@pytest.mark.parametrize("numel", [2, 1000, CHUNK_NUMEL + 5])
def test_constant_gradient_is_exactly_constant(value, numel):
    (moments,) = gradient_moments([torch.full((numel,), value)])
    assert moments.sum_of_squared_deviations == 0.0
    assert moments.is_constant
    assert not moments.is_zero
    assert fallback_snr(moments) == math.sqrt(numel)


def test_constant_to_the_precision_of_the_dtype():
    almost = torch.full((64,), 1.0)
    almost[0] += 2.0**-23  # one rounding step of float32
    bf16 = torch.full((64,), 1.0, dtype=torch.bfloat16)
    bf16[0] += 2.0**-7
    spread = torch.full((64,), 1.0)
    spread[::2] += 2.0**-20
    assert [moments.is_constant for moments in gradient_moments([almost, bf16, spread])] == [True, True, False]


def test_kinds_of_gradient():
    gradients = [
        torch.zeros(4),
        torch.tensor([0.0, math.inf]),
        torch.tensor([math.nan, 1.0]),
        torch.empty(0),
        torch.tensor(2.0),
        torch.tensor([1e-45, 0.0]),  # the smallest number above zero
        torch.tensor([3e38, -3e38]),  # the square overflows float32
    ]
    moments = gradient_moments(gradients)
    assert [m.is_zero for m in moments] == [True, False, False, True, False, False, False]
    assert [m.is_finite for m in moments] == [True, False, False, True, True, True, True]
    assert moments[4].is_constant
    assert gradient_snr(moments[6], 1e-8) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-20, 1e-10, 1e-3, 1e3, 1e10])
def test_scale_of_the_gradient_does_not_matter(factor):
    gradient = torch.randn(50, 50)
    plain, scaled = gradient_moments([gradient, gradient * factor])
    assert gradient_snr(plain, 1e-8) == pytest.approx(gradient_snr(scaled, 1e-8), rel=1e-3)


def test_gradients_are_not_written():
    gradient = torch.randn(10)
    before = gradient.clone()
    gradient_moments([gradient])
    assert torch.equal(gradient, before)


def test_moments_in_rows_as_accelerators_take_them_are_those_of_the_plain_pass(monkeypatch):
    monkeypatch.setattr(gsnr, "STACKED_NUMEL", 300)
    monkeypatch.setattr(gsnr, "ROW_NUMEL", 64)
    monkeypatch.setattr(gsnr, "ACCELERATOR_CHUNK_NUMEL", 256)
    shapes = [(5,), (), (20, 15), (7, 99), (0, 3), (5,), (64, 10), (300,), (2, 301), (5,)]
    gradients = [torch.randn(shape) * 10.0 ** (i - 4) + i for i, shape in enumerate(shapes)]
    gradients += [gradients[6].bfloat16(), gradients[3].double(), gradients[3].t(), torch.full((1000,), 0.1)]
    gradients += [torch.zeros(500), torch.full((700,), 1e-30), torch.tensor([1.0] * 900 + [math.inf] * 100)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsnr, "is_accelerator", lambda device: True)
        found = gsnr.gradient_moments(gradients)
    for one, gradient in zip(found, gradients, strict=True):
        values = gradient.double().flatten()
        assert one.count == len(values)
        if not values.isfinite().all():
            assert not one.is_finite
        elif len(values):
            assert one.mean == pytest.approx(values.mean().item(), rel=1e-12)
            deviations = (values - values.mean()).square().sum().item()
            assert one.sum_of_squared_deviations == pytest.approx(deviations, rel=1e-12, abs=1e-70)
    assert found[-4].is_constant
    assert found[-4].sum_of_squared_deviations == 0.0
    assert found[-3].is_zero
    assert found[4].is_zero
