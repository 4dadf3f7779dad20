"""
The two operators of SWAN as pure functions of tensors: row-wise normalisation and whitening of a matrix gradient.

Source: Ma, Gong, Scetbon, Meeds, "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training", arXiv
2412.13148; Polar Express: Amsel, Persson, Musco, Gower, arXiv 2505.16932.

All take matrices `[..., m, n]` (rows are output features; leading dimensions are a batch), of any floating dtype, and
compute in float32 or above. For finite input the output is finite, and the scale of the input does not matter.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


Method = Literal["newton_schulz", "polar_express", "svd"]
METHODS = ("newton_schulz", "polar_express", "svd")
DEFAULT_STEPS = {"newton_schulz": 10, "polar_express": 8, "svd": 0}

# Odd quintic polynomials p(x) = a x + b x^3 + c x^5, each the best for the interval that the one before leaves, for
# singular values from 1e-3 to 1 (Polar Express, Algorithm 1 with l = 1e-3). The last repeats.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Rounding could carry a singular value of 1 out of the interval, where the polynomials explode: all but the last are
# applied to a matrix that is this much smaller.
SAFETY = 1.01


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
    rounding = torch.finfo(gradient.dtype).eps
    largest = wide.abs().amax(dim=-1, keepdim=True)
    rows = wide / _nonzero(largest)  # within [-1, 1]: no square overflows or vanishes
    centred = rows - rows.mean(dim=-1, keepdim=True)
    spread = centred.abs().amax(dim=-1, keepdim=True)
    has_deviation = spread > rounding
    scaled = torch.where(has_deviation, centred / _nonzero(spread), torch.zeros_like(centred))
    std = scaled.square().mean(dim=-1, keepdim=True).sqrt()
    return scaled / _nonzero(std)


def grad_whitening(matrix: Tensor, method: Method = "newton_schulz", steps: int | None = None) -> Tensor:
    """
    `(X X^T)^(-1/2) X`, the nearest matrix with orthonormal rows (columns where m > n): `U V^T` of the thin SVD.

    Directions in which the matrix has no extent stay 0 ("svd"), or next to it.

    Args:
        matrix (`torch.Tensor`): `[..., m, n]`.
        method (`str`, *optional*, defaults to `"newton_schulz"`):
            `"newton_schulz"`: the paper's coupled iteration on the Gram matrix, 10 steps. Directions below about a
            fiftieth of the matrix's norm stay un-whitened. `"polar_express"`: 8 optimal polynomials on the matrix
            itself; singular values within 0.01 of 1 where they were above 1e-3 of the matrix's norm. `"svd"`: exact.
        steps (`int`, *optional*): Of the iteration; 10 for `"newton_schulz"`, 8 for `"polar_express"`.

    Returns:
        `torch.Tensor`: Same shape, float32 or float64.

    Raises:
        `ValueError`: The method is not known, or `steps` is below 1.
    """
    if method not in METHODS:
        raise ValueError(f"whitening must be one of {', '.join(METHODS)} but is {method!r}; choose one")
    steps = DEFAULT_STEPS[method] if steps is None else steps
    if method != "svd" and steps < 1:
        raise ValueError(
            f"ns_steps must be a whole number >= 1 but is {steps!r}; the default is {DEFAULT_STEPS[method]}"
        )
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    tall = wide.shape[-2] > wide.shape[-1]
    wide = wide.mT if tall else wide
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True) if wide.numel() else wide.new_ones(())
    wide = wide / _nonzero(largest)
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    unit = wide / _nonzero(norm)
    result = {"newton_schulz": _newton_schulz, "polar_express": _polar_express, "svd": _svd}[method](unit, steps)
    return result.mT if tall else result


def swan_direction(gradient: Tensor, method: Method = "newton_schulz", steps: int | None = None) -> Tensor:
    """
    SWAN's update direction: GradNorm, then whitening, then rescaling to the norm that GradNorm left.

    That norm is `sqrt(m n)` where every row has deviation, so that the update has RMS 1. A zero gradient gives zeros.

    Args:
        gradient (`torch.Tensor`): `[..., m, n]`, finite.
        method (`str`, *optional*): As in [`grad_whitening`].
        steps (`int`, *optional*): As in [`grad_whitening`].
    """
    normed = grad_norm(gradient)
    whitened = grad_whitening(normed, method, steps)
    target = torch.linalg.matrix_norm(normed, keepdim=True)
    return whitened * (target / _nonzero(torch.linalg.matrix_norm(whitened, keepdim=True)))


def _nonzero(value: Tensor) -> Tensor:
    """1 in place of 0: what is divided by it is 0 there anyway."""
    return torch.where(value == 0, torch.ones_like(value), value)


def _newton_schulz(unit: Tensor, steps: int) -> Tensor:
    """`Z X` with `Z -> (X X^T)^(-1/2)`: Y <- Y T / 2, Z <- T Z / 2, T = 3 I - Z Y (the paper's Algorithm)."""
    identity = torch.eye(unit.shape[-2], dtype=unit.dtype, device=unit.device)
    y = unit @ unit.mT
    z = identity.expand_as(y)
    for _ in range(steps):
        t = 3.0 * identity - z @ y
        y = 0.5 * (y @ t)
        z = 0.5 * (t @ z)
    return z @ unit


def _polar_express(unit: Tensor, steps: int) -> Tensor:
    x = unit / SAFETY
    for step in range(steps):
        a, b, c = POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]
        if step < len(POLAR_EXPRESS) - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _svd(unit: Tensor, steps: int) -> Tensor:
    u, s, vh = torch.linalg.svd(unit, full_matrices=False)
    largest = s[..., :1] if s.shape[-1] else s
    kept = s > largest * max(unit.shape[-2:]) * torch.finfo(unit.dtype).eps
    return (u * kept.to(unit.dtype).unsqueeze(-2)) @ vh
