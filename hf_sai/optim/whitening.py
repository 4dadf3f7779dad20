"""
The two operators of SWAN as pure functions of tensors: row-wise normalisation and whitening of a matrix gradient.

Source: Ma, Gong, Scetbon, Meeds, "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training", arXiv
2412.13148; Polar Express: Amsel, Persson, Musco, Gower, arXiv 2505.16932.

All take matrices `[..., m, n]` (rows are output features; leading dimensions are a batch), of any floating dtype, and
compute in float32 or above unless asked for less. For finite input the output is finite, and the scale of the input
does not matter.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_whole


Method = Literal["newton_schulz", "polar_express", "svd"]
METHODS = ("newton_schulz", "polar_express", "svd")
DEFAULT_STEPS = {"newton_schulz": 10, "polar_express": 6, "svd": 0}

# Odd quintic polynomials p(x) = a x + b x^3 + c x^5, each the best for the interval that the one before leaves, for
# singular values from 4e-4 to 1 (Polar Express, Algorithm 1 with l = 4e-4): a condition number of 1e3, and what the
# bound on the largest gives away. As its authors advise no interval is taken to begin below 0.018 of its end: the best
# polynomials would press some of the large values down to next to nothing, where bfloat16 loses them. Six bring all to
# [0.96, 1.04], seven to 1 +- 4e-5. The last repeats.
POLAR_EXPRESS = (
    (8.356508414472076, -24.04957064186161, 17.689719625562915),
    (4.163087018936379, -3.005320943912481, 0.5544946712301076),
    (4.094522822469242, -2.987378794824025, 0.5570682947389269),
    (3.8008866236536596, -2.8399134552313146, 0.5499724211921846),
    (2.9348713296694293, -2.195981182370084, 0.4770526691526805),
    (2.0541003456765528, -1.437210235392236, 0.3941595112170839),
    (1.8765615799748472, -1.2517339963828547, 0.3751734419254348),
    (1.875, -1.25, 0.375),
)
# Rounding can carry a singular value out of the interval, where the polynomials explode: all but the last are applied
# to a matrix that is this much smaller. In bfloat16 the terms of the first ones, ten times larger than their sum,
# leave an error of up to 6%.
SAFETY = {torch.bfloat16: 1.07}
DEFAULT_SAFETY = 1.01


def grad_norm(gradient: Tensor) -> Tensor:
    """
    Centres every row and divides it by its standard deviation: `(G - mean) / std` over the columns, biased (GradNorm).

    A row without deviation (all elements equal to the precision of its dtype, or one column) gives zeros.

    Args:
        gradient (`torch.Tensor`): `[..., m, n]`.

    Returns:
        `torch.Tensor`: Same shape, float32 or float64; every other row has norm `sqrt(n)`.
    """
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if wide.numel() == 0:
        return wide
    largest = torch.linalg.vector_norm(wide, ord=math.inf, dim=-1, keepdim=True)
    rows = wide / _nonzero(largest)  # within [-1, 1]: no square overflows or vanishes
    # LayerNorm is GradNorm, and every backend has it in one pass.
    normed, _, inverse_std = torch.native_layer_norm(rows, rows.shape[-1:], None, None, 1e-30)
    return normed.mul_(inverse_std * torch.finfo(gradient.dtype).eps < 1.0)


def grad_whitening(
    matrix: Tensor,
    method: Method = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """
    `(X X^T)^(-1/2) X`, the nearest matrix with orthonormal rows (columns where m > n): `U V^T` of the thin SVD.

    Directions in which the matrix has no extent stay 0 ("svd"), or next to it.

    Args:
        matrix (`torch.Tensor`): `[..., m, n]`.
        method (`str`, *optional*, defaults to `"polar_express"`):
            `"polar_express"`: 6 optimal polynomials on the matrix itself, the cheapest. Singular values come to
            [0.94, 1.06], in bfloat16 [0.75, 1.06], where the condition number is at most 1e3 (and the smaller side at
            most 1024).
            `"newton_schulz"`: the paper's coupled iteration on the Gram matrix, 10 steps; directions below about a
            fiftieth of the matrix's norm stay un-whitened. `"svd"`: exact.
        steps (`int`, *optional*): Of the iteration; 6 for `"polar_express"`, 10 for `"newton_schulz"`.
        dtype (`torch.dtype`, *optional*): Of the arithmetic of `"polar_express"`, such as bfloat16, which is several
            times faster where the hardware knows it. The other methods need the digits and take no notice.

    Returns:
        `torch.Tensor`: Same shape, float32 or float64.

    Raises:
        `ValueError`: The method is not known, or `steps` is below 1.
    """
    check_whitening(method, steps)
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if wide.numel() == 0:
        return wide
    largest = torch.linalg.vector_norm(wide, ord=math.inf, dim=(-2, -1), keepdim=True)
    return _whitened(wide / _nonzero(largest), method, steps, dtype).to(wide.dtype)


def check_whitening(method: str, steps: int | None) -> None:
    """
    Raises `ValueError` where the method is not known or the steps are out of range.

    Args:
        method (`str`): One of `METHODS`.
        steps (`int`, *optional*): `None` for the method's own.
    """
    check_choice("whitening", method, METHODS)
    check_whole("ns_steps", steps, f"None takes the method's own, {DEFAULT_STEPS[method]}", optional=True)


def swan_direction(
    gradient: Tensor,
    method: Method = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """
    SWAN's update direction: GradNorm, then whitening, then rescaling to the norm that GradNorm left.

    That norm is `sqrt(m n)` where every row has deviation, so that the update has RMS 1. A zero gradient gives zeros.

    Args:
        gradient (`torch.Tensor`): `[..., m, n]`, finite.
        method (`str`, *optional*): As in [`grad_whitening`].
        steps (`int`, *optional*): As in [`grad_whitening`].
        dtype (`torch.dtype`, *optional*): As in [`grad_whitening`].
    """
    normed = grad_norm(gradient)
    if normed.numel() == 0:
        return normed
    target = torch.linalg.vector_norm(normed, dim=(-2, -1), keepdim=True)
    whitened = _whitened(normed, method, steps, dtype)
    norm = torch.linalg.vector_norm(whitened, dim=(-2, -1), keepdim=True, dtype=normed.dtype)
    return whitened * (target / _nonzero(norm))


def _whitened(wide: Tensor, method: Method, steps: int | None, dtype: torch.dtype | None) -> Tensor:
    """Whitens matrices whose elements are near 1 in size; the result may be of the asked-for dtype."""
    check_whitening(method, steps)
    steps = DEFAULT_STEPS[method] if steps is None else steps
    tall = wide.shape[-2] > wide.shape[-1]
    flat = (wide.mT if tall else wide).reshape(-1, *sorted(wide.shape[-2:]))
    if method == "polar_express":
        result = _polar_express(flat.to(dtype or flat.dtype), steps)
    else:
        unit = flat / _nonzero(torch.linalg.vector_norm(flat, dim=(-2, -1), keepdim=True))
        result = _newton_schulz(unit, steps) if method == "newton_schulz" else _svd(unit)
    result = result.reshape(wide.mT.shape if tall else wide.shape)
    return result.mT if tall else result


def _nonzero(value: Tensor) -> Tensor:
    """1 in place of 0: what is divided by it is 0 there anyway."""
    return torch.where(value == 0, torch.ones_like(value), value)


def _newton_schulz(unit: Tensor, steps: int) -> Tensor:
    """`Z X` with `Z -> (X X^T)^(-1/2)`: Y <- Y T / 2, Z <- T Z / 2, T = 3 I - Z Y (the paper's Algorithm)."""
    y = torch.bmm(unit, unit.mT)
    z = None  # the identity
    for step in range(steps):
        t = y.neg() if z is None else torch.bmm(z, y).neg_()
        t.diagonal(dim1=-2, dim2=-1).add_(3.0)
        z = t.mul(0.5) if z is None else torch.bmm(t, z).mul_(0.5)
        if step < steps - 1:
            y = torch.bmm(y, t).mul_(0.5)
    assert z is not None  # there is at least one step
    return torch.bmm(z, unit)


def _polar_express(x: Tensor, steps: int) -> Tensor:
    safety = SAFETY.get(x.dtype, DEFAULT_SAFETY)
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]
        if step < len(POLAR_EXPRESS) - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        gram = torch.bmm(x, x.mT)
        squared = torch.bmm(gram, gram)
        if step == 0:
            # ||(X X^T)^2||^(1/4), the 8-norm of the singular values, bounds the largest from above as ||X|| does, but
            # tightly, and both products are there anyway: only their scale is still open.
            wide = torch.promote_types(x.dtype, torch.float32)
            bound = torch.linalg.vector_norm(squared, dim=(-2, -1), keepdim=True, dtype=wide).pow_(0.25)
            bound = _nonzero(bound)
            x, gram, squared = (x / bound).to(x.dtype), (gram / bound**2).to(x.dtype), (squared / bound**4).to(x.dtype)
        polynomial = squared.mul_(c).add_(gram, alpha=b)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _svd(unit: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(unit, full_matrices=False)
    # Centring leaves one direction of a square matrix empty but for rounding, which near-constant rows magnify.
    kept = s > s[..., :1] * torch.finfo(unit.dtype).eps ** (2 / 3)
    return (u * kept.to(unit.dtype).unsqueeze(-2)) @ vh
