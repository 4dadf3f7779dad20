"""SWAN's operators against float64 oracles: values, batches, hard matrices, and what is refused."""

from __future__ import annotations

import math
import random

import numpy
import pytest
import reference
import torch

from hf_sai.optim.whitening import METHODS, grad_norm, grad_whitening, swan_direction


def oracle(gradient):
    """The direction of one finite matrix, before rescaling, in float64."""
    return torch.from_numpy(reference.whitened(numpy.array(reference.grad_norm(gradient.double().tolist()))))


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def conditioned(m, n, condition, seed=0):
    """A matrix whose singular values fall evenly (in the logarithm) from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))
    return (u * torch.logspace(0, -math.log10(condition), m, dtype=torch.float64)) @ v.T


# ---- GradNorm ----


def test_grad_norm_by_hand():
    found = grad_norm(torch.tensor([[1.0, 3.0], [0.0, 4.0], [5.0, 5.0]]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("shape", [(3, 5), (7, 2), (1, 9), (64, 33)])
def test_grad_norm_equals_the_reference_and_rows_have_norm_sqrt_n(shape):
    gradient = torch.randn(shape) * 0.01 + 3.0
    found = grad_norm(gradient)
    expected = torch.tensor(reference.grad_norm(gradient.double().tolist()), dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)  # 3.0 +- 0.01 has few digits left
    torch.testing.assert_close(found.norm(dim=-1), torch.full(shape[:1], math.sqrt(shape[1])), rtol=1e-5, atol=0)


def test_rows_without_deviation_give_zeros():
    gradient = torch.randn(4, 6)
    gradient[1] = 0.1
    gradient[2] = 0.0
    assert grad_norm(gradient)[1:3].abs().max() == 0.0
    assert grad_norm(torch.randn(5, 1)).abs().max() == 0.0
    assert grad_norm(torch.zeros(3, 4)).abs().max() == 0.0
    assert grad_norm(torch.full((2, 8), 1.0).bfloat16()).dtype == torch.float32


# ---- Whitening ----

WIDE = [(8, 40), (16, 48), (32, 100), (64, 200), (100, 300), (128, 512), (256, 688), (4, 64), (2, 9), (24, 96)]


@pytest.mark.parametrize("shape", WIDE + [shape[::-1] for shape in WIDE])
def test_newton_schulz_at_ten_steps_on_gaussian_matrices(shape):
    matrix = torch.randn(shape)
    expected = torch.from_numpy(reference.whitened(matrix.double().numpy()))
    assert relative(grad_whitening(matrix, "newton_schulz"), expected) < 2e-2
    assert relative(grad_whitening(matrix, "polar_express"), expected) < 4e-2
    assert relative(grad_whitening(matrix, "polar_express", steps=7), expected) < 1e-3
    assert relative(grad_whitening(matrix, "svd"), expected) < 1e-5


def flat_but_one(m, n, condition):
    """All singular values 1 but the last."""
    u, _ = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))
    values = torch.ones(m, dtype=torch.float64)
    values[-1] = 1.0 / condition
    return (u * values) @ v.T


@pytest.mark.parametrize("condition", [1, 10, 100, 1000])
@pytest.mark.parametrize("spectrum", [conditioned, flat_but_one])
@pytest.mark.parametrize("shape", [(64, 100), (256, 256)])
def test_polar_express_brings_singular_values_to_one(condition, spectrum, shape):
    matrix = spectrum(*shape, condition).float()
    for dtype, least in ((None, 0.94), (torch.bfloat16, 0.75)):
        values = torch.linalg.svdvals(grad_whitening(matrix, "polar_express", dtype=dtype))
        assert least < values.min() <= values.max() < 1.06


@pytest.mark.parametrize("shape", [(64, 200), (256, 688), (256, 256), (100, 40)])
def test_bf16_arithmetic_is_near_enough_on_gaussian_matrices(shape):
    matrix = torch.randn(shape)
    exact = grad_whitening(matrix, "svd").double()
    assert relative(grad_whitening(matrix, "polar_express", dtype=torch.bfloat16), exact) < 5e-2


def test_newton_schulz_leaves_small_directions_as_documented():
    values = torch.linalg.svdvals(grad_whitening(conditioned(64, 100, 1000).float(), "newton_schulz"))
    assert values.max() < 1.01
    assert values.min() < 0.1


def test_a_batch_equals_its_matrices_one_by_one():
    batch = torch.randn(2, 3, 6, 20)
    for method in METHODS:
        together = swan_direction(batch, method)
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(together[i, j], swan_direction(batch[i, j], method), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (5, 64)])
def test_direction_is_the_whitened_norm_with_rms_one(method, shape):
    gradient = torch.randn(shape)
    found = swan_direction(gradient, method)
    expected = oracle(gradient)
    expected = expected * math.sqrt(shape[0] * shape[1]) / expected.norm()
    assert found.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-5)
    assert relative(found, expected) < (4e-2 if method == "polar_express" else 2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_one_row_and_empty_gradients(method):
    assert swan_direction(torch.zeros(4, 7), method).abs().max() == 0.0
    row = torch.tensor([[1.0, -2.0, 4.0, 0.5]])
    torch.testing.assert_close(swan_direction(row, method), grad_norm(row), rtol=1e-5, atol=1e-6)
    assert swan_direction(torch.zeros(0, 3), method).shape == (0, 3)
    assert swan_direction(torch.zeros(2, 4, 0), method).shape == (2, 4, 0)


def hard_matrix(rng):
    """Gaussian, rank-deficient, badly conditioned, with equal or zero rows; scaled from 1e-30 to 1e30."""
    m, n = rng.choice([(3, 3), (4, 9), (9, 4), (1, 6), (16, 16), (12, 30), (30, 12)])
    kind = rng.choice(["gaussian", "low_rank", "conditioned", "equal_rows", "zero_rows", "large_mean"])
    matrix = torch.randn(m, n)
    if kind == "low_rank":
        matrix = torch.randn(m, 2) @ torch.randn(2, n)
    elif kind == "conditioned":
        matrix = conditioned(min(m, n), max(m, n), 10 ** rng.uniform(0, 8)).float()
    elif kind == "equal_rows":
        matrix[:] = matrix[0]
    elif kind == "zero_rows":
        matrix[::2] = 0.0
    elif kind == "large_mean":
        matrix += 100.0
    return matrix * rng.choice([1e-30, 1e-8, 1.0, 1e8, 1e30])


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
def test_a_thousand_hard_matrices_stay_finite_and_do_not_feel_the_scale(method):
    rng = random.Random(0)
    for _ in range(1000):
        matrix = hard_matrix(rng)
        found = swan_direction(matrix, method)
        assert found.isfinite().all()
        assert found.square().mean() < 1.0 + 1e-4
        # A power of two leaves the digits alone, so that what differs is the operators' doing.
        for factor in (2.0**-20, 2.0**20):
            if (matrix * factor).isfinite().all() and (matrix * factor / factor == matrix).all():
                torch.testing.assert_close(swan_direction(matrix * factor, method), found, rtol=1e-5, atol=1e-5)


def test_bf16_gradients_are_whitened_in_float32():
    gradient = torch.randn(16, 48).bfloat16()
    assert torch.equal(swan_direction(gradient), swan_direction(gradient.float()))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="whitening must be one of newton_schulz, polar_express, svd but is 'qr'"):
        grad_whitening(torch.randn(2, 3), "qr")
    for steps in (0, 2.5, True):
        with pytest.raises(
            ValueError, match=r"ns_steps must be a whole number >= 1 or None but is .*the method's own, 6"
        ):
            grad_whitening(torch.randn(2, 3), steps=steps)


@pytest.mark.parametrize("shape", [(2, 8), (4, 128), (128, 4), (8, 50), (32, 32), (64, 128)])
def test_bf16_never_leaves_the_interval_where_the_polynomials_explode(shape):
    """The rounding of a small matrix adds up in one direction: adapters of rank 4 came to NaN by it."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("gaussian", "rows", "columns"):
        matrices = torch.randn(1000, *shape, generator=generator)
        if kind == "rows":
            matrices *= torch.logspace(0, -3, shape[0]).unsqueeze(-1)
        elif kind == "columns":
            matrices *= torch.logspace(0, -3, shape[1])
        for given in (matrices, grad_norm(matrices)):
            values = torch.linalg.svdvals(grad_whitening(given, "polar_express", dtype=torch.bfloat16))
            assert values.max() < 1.1  # NaN is not, either
