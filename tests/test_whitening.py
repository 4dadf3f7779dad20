"""SWAN's operators against float64 oracles: values, batches, hard matrices, and what is refused."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy
import pytest
import reference
import torch

from hf_sai.optim import polynomials, swan_preset
from hf_sai.optim.whitening import METHODS, grad_norm, grad_whitening, sizes, swan_direction


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
        assert least < values.min() <= values.max() < 1.07


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


# Relative distances to U V^T on Gaussian matrices: of the polynomials' errors, and NSDS next to no whitening at all.
NEAR = {"polar": 0.25, "polar_express": 4e-2, "newton_schulz": 2e-2, "nsds": 0.35, "svd": 1e-5}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (5, 64)])
def test_direction_is_the_whitened_norm_with_rms_one(method, shape):
    gradient = torch.randn(shape)
    found = swan_direction(gradient, method)
    expected = oracle(gradient)
    expected = expected * math.sqrt(shape[0] * shape[1]) / expected.norm()
    assert found.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-5)
    assert relative(found, expected) < NEAR[method]


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


@pytest.mark.parametrize("method", ["polar", "newton_schulz", "polar_express", "nsds"])
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
    with pytest.raises(
        ValueError, match="whitening must be one of polar, polar_express, newton_schulz, nsds, svd but is"
    ):
        grad_whitening(torch.randn(2, 3), "qr")
    for steps in (0, 2.5, True):
        with pytest.raises(
            ValueError, match=r"ns_steps must be a whole number >= 1 or None but is .*the method's own, 3"
        ):
            grad_whitening(torch.randn(2, 3), steps=steps)
    with pytest.raises(ValueError, match="ns_steps of whitening='nsds' must be 2 but is 3"):
        grad_whitening(torch.randn(2, 3), "nsds", steps=3)
    for beta in (0.0, 1.0, "half"):
        with pytest.raises(ValueError, match="ns_beta must be a number between 0 and 1 or None but is"):
            grad_whitening(torch.randn(2, 3), "newton_schulz", beta=beta)


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


# ---- The paper's iteration, with its two step sizes, and its fast member ----

SIGMAS = (1.0, 0.5, 1e-2, 1e-3, 1e-4, 1e-5)
AFTER_TEN = {
    0.8: (1.132412, 1.546679, 1.218312, 0.564251, 0.616406, 0.063386),
    0.5: (1.0, 1.0, 0.529450, 0.057614, 0.005766, 0.000577),
}


@pytest.mark.parametrize("beta", AFTER_TEN)
@pytest.mark.parametrize("tall", [False, True])
def test_newton_schulz_takes_singular_values_where_the_scalar_iteration_does(beta, tall):
    for sigma, expected in zip(SIGMAS, AFTER_TEN[beta], strict=True):
        rest = math.sqrt(max(0.0, 1.0 - sigma**2))  # the norm of the matrix is 1
        matrix = torch.zeros(3, 5, dtype=torch.float64)
        matrix[0, 2], matrix[1, 0] = sigma, rest
        matrix = matrix.mT.contiguous() if tall else matrix
        found = grad_whitening(matrix, "newton_schulz", beta=beta)
        assert (found.mT if tall else found)[0, 2].item() == pytest.approx(expected, abs=1e-6)


def test_beta_of_eight_tenths_scatters_as_documented():
    matrix = conditioned(64, 100, 100)
    values = torch.linalg.svdvals(grad_whitening(matrix, "newton_schulz", beta=0.8))
    assert 0.563 < values.min() < 0.7
    assert 1.4 < values.max() < 1.6001
    assert torch.linalg.svdvals(grad_whitening(matrix, "newton_schulz", steps=20)).sub(1).abs().max() < 1e-3


def test_nsds_is_the_closed_form():
    rows = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64)).Q.mT
    torch.testing.assert_close(grad_whitening(rows, "nsds"), 1.1869 * rows / 2.0)  # Z X / ||X||_F, which is 2
    two = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    expected = torch.tensor([[1.0, -0.12], [-0.12, 1.0]], dtype=torch.float64) @ two / math.sqrt(2.0)
    torch.testing.assert_close(grad_whitening(two, "nsds"), expected)
    tall = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(grad_whitening(tall, "nsds"), grad_whitening(tall.mT.contiguous(), "nsds").mT)


def test_nsds_is_little_more_than_grad_norm():
    gradient = torch.randn(48, 96) @ torch.randn(96, 96)
    normed, found = grad_norm(gradient), swan_direction(gradient, "nsds")
    assert (normed * found).sum() / (normed.norm() * found.norm()) > 0.97


def test_presets_are_what_they_say():
    assert swan_preset("swan") == swan_preset("swan-0")
    assert (swan_preset("swan")["whitening"], swan_preset("swan")["ns_beta"]) == ("newton_schulz", 0.8)
    assert (swan_preset("nsds")["whitening"], swan_preset("nsds")["ns_steps"]) == ("nsds", 2)
    with pytest.raises(ValueError, match="name must be one of swan-0, swan, nsds but is 'muon'"):
        swan_preset("muon")


# ---- The polynomials ----


@pytest.mark.parametrize(("steps", "lower"), [(1, 0.1), (2, 0.03), (3, 0.01), (4, 0.003), (5, 0.001), (6, 4e-4)])
def test_polynomials_are_the_optimal_ones(steps, lower):
    expected = reference.optimal_quintics(lower, steps)
    assert numpy.allclose(polynomials.quintics(steps), expected, rtol=1e-9, atol=0)
    assert numpy.allclose(polynomials.quintics(9)[:6], polynomials.quintics(6))
    assert numpy.allclose(polynomials._LEVELLING, reference.optimal_quintics(1 / 64, 4), rtol=1e-9, atol=0)


@pytest.fixture(scope="module")
def real_gradients():
    """Of the feed-forward matrices of a byte-level LLaMA on source text: two wide ones, one tall."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    text = torch.frombuffer(bytearray(Path(random.__file__).read_bytes()), dtype=torch.uint8).long()
    blocks = text[: 12 * 128].view(12, 128)
    model(input_ids=blocks, labels=blocks).loss.backward()
    mlp = model.model.layers[0].mlp
    return [layer.weight.grad for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def spectrum(gradient, method, steps):
    """What becomes of the singular values above a hundredth of the largest, and the largest that there is."""
    normed = grad_norm(gradient)
    found = grad_whitening(normed, method, steps, torch.bfloat16).double()
    u, s, vh = torch.linalg.svd(normed.double(), full_matrices=False)
    along = torch.einsum("ij,ik,jk->j", u, found, vh)
    return along[s > 1e-2 * s[0]].min().item(), torch.linalg.svdvals(found).max().item()


def test_real_spectra_come_to_where_it_is_documented(real_gradients):
    for gradient in real_gradients:
        for method, steps, least, most in (
            ("polar", 3, 0.6, 1.35),
            ("polar", 2, 0.4, 1.45),
            ("polar_express", 6, 0.8, 1.07),
            ("newton_schulz", 10, 0.4, 1.01),
        ):
            low, high = spectrum(gradient, method, steps)
            assert least < low < high < most, (method, steps)


def test_four_polynomials_on_one_gram_matrix_explode_in_bf16_and_restarts_do_not(real_gradients):
    """On Gaussian matrices it would not be seen."""
    for gradient in real_gradients:
        x = grad_norm(gradient).bfloat16().unsqueeze(0)
        assert torch.linalg.svdvals(polynomials.polar_factor(x, 4).float()).max() < 1.3
        assert torch.linalg.svdvals(polynomials.polar_factor(x, 4, group=4).float()).max() > 3.0


def test_flattening_takes_the_largest_down_to_the_next_and_leaves_the_rest():
    values = torch.cat([torch.tensor([100.0, 50.0, 20.0, 10.0, 5.0, 3.0, 2.0, 1.5]), torch.linspace(1.0, 0.5, 56)])
    u, v = (torch.linalg.qr(torch.randn(size, 64, dtype=torch.float64)).Q for size in (64, 200))
    for x in ((u * values) @ v.mT, ((u * values) @ v.mT).mT.contiguous()):
        found = torch.linalg.svdvals(polynomials.flatten_(x.unsqueeze(0).clone())[0])
        assert found[0] < 2.5
        assert found[8:].min() > 0.45
        assert torch.linalg.svdvals(x)[0] > 99.0


# ---- Edges ----


def edge(name):
    generator = torch.Generator().manual_seed(5)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator)

    if name == "rank 1":
        return gaussian(64, 1) @ gaussian(1, 96)
    if name == "rank 3":
        return gaussian(64, 3) @ gaussian(3, 96)
    if name == "rank 8":  # as many as are flattened
        return gaussian(64, 8) @ gaussian(8, 96)
    if name == "equal rows":
        return gaussian(1, 90).expand(48, 90).contiguous()
    if name == "rows in pairs":
        return gaussian(24, 400).repeat_interleave(2, 0)
    if name == "every other row":
        matrix = gaussian(48, 400)
        matrix[1::2] = matrix[0]
        return matrix
    if name in ("4 x 8", "1 x 9", "9 x 1", "2 x 2"):
        return gaussian(*map(int, name.split(" x ")))
    if name == "zero":
        return torch.zeros(40, 64)
    if name == "40 equal":
        u, v = (torch.linalg.qr(gaussian(size, 128)).Q for size in (128, 200))
        return (u * torch.where(torch.arange(128) < 40, 1.0, 1e-2)) @ v.mT
    if name == "logspace":
        return conditioned(128, 200, 1e3).float()
    assert name in ("1e-30", "1e30")
    return gaussian(64, 96) * float(name)


EDGES = ["rank 1", "rank 3", "rank 8", "equal rows", "rows in pairs", "every other row", "4 x 8", "1 x 9", "9 x 1"]
EDGES += ["2 x 2", "zero", "40 equal", "logspace", "1e-30", "1e30"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", [2, 3, None])
@pytest.mark.parametrize("name", EDGES)
def test_edges_stay_finite_within_the_bound_and_of_rms_one(name, steps, dtype):
    for method in ("polar_express", "nsds") if steps is None else ("polar",):
        for matrix in (edge(name), edge(name).mT.contiguous()):
            values = torch.linalg.svdvals(grad_whitening(matrix, method, steps, dtype))
            assert values.isfinite().all()
            assert values.max() < (1.1 if method == "polar_express" else 1.5)
            found, normed = swan_direction(matrix, method, steps, dtype), grad_norm(matrix)
            assert found.isfinite().all()
            torch.testing.assert_close(found.norm(), normed.norm(), rtol=1e-3, atol=1e-6)


def test_the_known_weak_spectra_are_as_weak_as_documented():
    for name, two, three in (("40 equal", 0.08, 0.3), ("logspace", 0.015, 0.05)):
        for steps, least in ((2, two), (3, three)):
            values = torch.linalg.svdvals(grad_whitening(edge(name), "polar", steps, torch.bfloat16))
            assert values.min() > least


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_zero_matrix_in_a_batch_disturbs_no_other(method, dtype):
    batch = torch.randn(3, 40, 64)
    batch[1] = 0.0
    found = swan_direction(batch, method, dtype=dtype)
    assert found[1].abs().max() == 0.0
    for index in (0, 2):
        alone = swan_direction(batch[index], method, dtype=dtype)
        assert relative(found[index], alone.double()) < 2e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_a_transposed_view_is_the_same_matrix(method, shape):
    gradient = torch.randn(shape)
    view = gradient.mT.contiguous().mT
    assert not view.is_contiguous()
    torch.testing.assert_close(grad_norm(view), grad_norm(gradient), rtol=1e-4, atol=1e-5)
    assert relative(swan_direction(view, method), swan_direction(gradient, method).double()) < 1e-3


@pytest.mark.parametrize("method", ["polar", "polar_express", "newton_schulz", "svd"])
def test_whitening_the_transpose_is_the_transpose(method):
    matrix = torch.randn(72, 40)
    torch.testing.assert_close(
        grad_whitening(matrix, method), grad_whitening(matrix.mT.contiguous(), method).mT, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("steps", [2, 3])
def test_a_thousand_random_matrices_in_bf16(steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(100):
        m, n = torch.randint(33, 90, (2,), generator=generator).tolist()
        batch = torch.randn(10, m, n, generator=generator)
        batch *= torch.rand(10, m, 1, generator=generator).mul(8).exp()
        batch[::3] = batch[::3] @ batch[::3].mT @ batch[::3]  # a spectrum to the third power
        values = torch.linalg.svdvals(grad_whitening(batch, "polar", steps, torch.bfloat16))
        assert values.isfinite().all()
        assert values.max() < 1.5


def test_sizes_of_gradients_of_several_dtypes_are_in_the_widest():
    """float64 gradients of float32 weights (`grad_dtype`) come beside float32 ones."""
    some = [torch.full((2, 2), value, dtype=dtype) for value, dtype in ((1.5, torch.float32), (1e100, torch.float64))]
    for gradients in (some, some[::-1]):
        found = sizes(gradients)
        assert found.dtype == torch.float64
        assert sorted(found.tolist()) == [3.0, 1e100]  # the norm; the largest value where squares leave the range
