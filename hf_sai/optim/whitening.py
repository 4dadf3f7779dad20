"""
The two operators of SWAN as pure functions of tensors: row-wise normalisation and whitening of a matrix gradient.

Source: Ma, Gong, Scetbon, Meeds, "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training", arXiv
2412.13148; the polynomials of `polynomials.py`.

All take matrices `[..., m, n]` (rows are output features; leading dimensions are a batch), of any floating dtype. For
finite input the output is finite, and the scale of the input does not matter. A transposed view is worked on as it
lies in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_whole
from .finite import is_known_at_once
from .polynomials import LEAST_NORM, flatten_, polar_factor, smaller_gram, times_smaller


Method = Literal["polar", "polar_express", "newton_schulz", "nsds", "svd"]
METHODS = ("polar", "polar_express", "newton_schulz", "nsds", "svd")
DEFAULT_STEPS = {"polar": 3, "polar_express": 6, "newton_schulz": 10, "nsds": 2, "svd": 0}
DEFAULT_BETA = {"newton_schulz": 0.5, "nsds": 0.4}
# The methods that multiply in the dtype that they are asked for; the others need the digits of float32.
IN_DTYPE = ("polar", "polar_express", "nsds")
# Up to this smaller side products are in float32 in any case: they cost next to nothing, and the rounding of a few
# rows adds up in one direction, by which the polynomials of bfloat16 explode (adapters of rank 4 came to NaN by it).
SMALL_SIDE = 32
# Elements that the CPU works on at a time, 1 MiB in float32: its cache holds them with what is made of them.
PIECE_NUMEL = 2**18
# Squares of elements of this size, and of what is a million times smaller, stay within float32.
LEAST_RMS, LARGEST_NORM = 1e-12, 1e15


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
    flat = wide.reshape(-1, *wide.shape[-2:])
    # Row by row: one may be 1e20 times another.
    rows = flat / _nonzero(torch.linalg.vector_norm(flat, ord=math.inf, dim=-1, keepdim=True))
    return normalized(rows, torch.finfo(gradient.dtype).eps)[0].reshape(wide.shape)


def grad_whitening(
    matrix: Tensor,
    method: Method = "polar",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    beta: float | None = None,
) -> Tensor:
    """
    `(X X^T)^(-1/2) X`, the nearest matrix with orthonormal rows (columns where m > n): `U V^T` of the thin SVD.

    Directions in which the matrix has no extent stay 0 ("svd"), or next to it.

    Args:
        matrix (`torch.Tensor`): `[..., m, n]`.
        method (`str`, *optional*, defaults to `"polar"`):
            `"polar"`: brings the largest directions down to a common level, then 3 optimal polynomials: singular
            values of real gradients come to [0.6, 1.4] where they are over a hundredth of the largest.
            `"polar_express"`: 6 optimal polynomials: [0.94, 1.06], in bfloat16 [0.75, 1.06], where the condition
            number is at most 1e3 (and the smaller side at most 1024).
            `"newton_schulz"`: the paper's coupled iteration on the Gram matrix, 10 steps; with `beta=0.5` directions
            below about a fiftieth of the matrix's norm stay un-whitened; with 0.8 those down to 2e-4 come to
            [0.563, 1.6] and scatter there, because the iteration circles its fixed point.
            `"nsds"`: two steps of it in which one factor is its diagonal; little more than GradNorm.
            `"svd"`: exact.
        steps (`int`, *optional*): Of the iteration: 3, 6, 10 and 2 by default. `"nsds"` has 2 only.
        dtype (`torch.dtype`, *optional*): Of the products of `"polar"`, `"polar_express"` and `"nsds"`, such as
            bfloat16, which is several times faster where the hardware knows it. The others take no notice.
        beta (`float`, *optional*): Step size of `"newton_schulz"` (0.5) and `"nsds"` (0.4).

    Returns:
        `torch.Tensor`: Same shape, float32 or float64.

    Raises:
        `ValueError`: The method is not known, or `steps` or `beta` is out of range.
    """
    check_whitening(method, steps, beta)
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if wide.numel() == 0:
        return wide
    flat = wide.reshape(-1, *wide.shape[-2:])
    flat = flat / power_of_two(torch.linalg.vector_norm(flat, ord=math.inf, dim=(-2, -1), keepdim=True))
    if method in IN_DTYPE:
        flat = flat.to(dtype or flat.dtype)
    return whitened(flat, method, steps, beta).to(wide.dtype).reshape(wide.shape)


def check_whitening(method: str, steps: int | None, beta: float | None = None) -> None:
    """
    Raises `ValueError` where the method is not known or an option of it is out of range.

    Args:
        method (`str`): One of `METHODS`.
        steps (`int`, *optional*): `None` for the method's own.
        beta (`float`, *optional*): `None` for the method's own.
    """
    check_choice("whitening", method, METHODS)
    check_whole("ns_steps", steps, f"None takes the method's own, {DEFAULT_STEPS[method]}", optional=True)
    if method == "nsds" and steps not in (None, 2):
        raise ValueError(f"ns_steps of whitening='nsds' must be 2 but is {steps}; leave it out")
    if beta is not None and not (isinstance(beta, (int, float)) and 0.0 < beta < 1.0):
        raise ValueError(
            f"ns_beta must be a number between 0 and 1 or None but is {beta!r}; 0.5 converges, 0.8 is that of a "
            "public implementation of the paper"
        )


def swan_direction(
    gradient: Tensor,
    method: Method = "polar",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    beta: float | None = None,
) -> Tensor:
    """
    SWAN's update direction: GradNorm, then whitening, then rescaling to the norm that GradNorm left.

    That norm is `sqrt(m n)` where every row has deviation, so that the update has RMS 1. A zero gradient gives zeros.

    Args:
        gradient (`torch.Tensor`): `[..., m, n]`, finite.
        method (`str`, *optional*): As in [`grad_whitening`].
        steps (`int`, *optional*): As in [`grad_whitening`].
        dtype (`torch.dtype`, *optional*): As in [`grad_whitening`].
        beta (`float`, *optional*): As in [`grad_whitening`].

    Returns:
        `torch.Tensor`: Same shape, float32 or float64.
    """
    check_whitening(method, steps, beta)
    if gradient.numel() == 0:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    flat = gradient.reshape(-1, *gradient.shape[-2:])
    flat = in_range(flat, sizes(list(flat.unbind(0))))
    normed, target = normalized(flat, torch.finfo(gradient.dtype).eps, dtype if method in IN_DTYPE else None)
    found = whitened(normed, method, steps, beta)
    return (found * factors_to(found, target).view(-1, 1, 1)).reshape(gradient.shape)


def sizes(gradients: Sequence[Tensor]) -> Tensor:
    """
    How large each gradient is; finite only if all its elements are.

    One pass without a mask of the gradients' size. On accelerators the largest absolute value; on the CPU the norm,
    which is vectorised there, or the largest absolute value where the squares leave the range of float32.

    Args:
        gradients (sequence of `torch.Tensor`): On one device.

    Returns:
        `torch.Tensor`: `[len(gradients)]`, float32 or float64.
    """
    dtype = functools.reduce(torch.promote_types, {each.dtype for each in gradients}, torch.float32)
    if not is_known_at_once(gradients[0].device):
        some = [each if each.numel() else each.new_zeros(1) for each in gradients]  # a rank may have no rows
        return torch.stack(torch._foreach_norm(some, math.inf, dtype))
    if all(each.dtype == dtype for each in gradients):
        norms = torch.stack(torch._foreach_norm(list(gradients)))
    else:
        norms = torch.stack([torch.linalg.vector_norm(each, dtype=dtype) for each in gradients])
    for index, (norm, gradient) in enumerate(zip(norms.tolist(), gradients, strict=True)):
        if gradient.numel() and not fits(norm, gradient.numel()):
            norms[index] = torch.linalg.vector_norm(gradient, ord=math.inf, dtype=dtype)
    return norms


def as_divisors(size: Tensor) -> Tensor:
    """On accelerators the powers of two below, for all matrices at once; on the CPU each is looked at by itself."""
    return size if is_known_at_once(size.device) else power_of_two(size)


def in_range(stack: Tensor, size: Tensor) -> Tensor:
    """
    Gradients in float32 or float64, of a size whose squares that holds.

    Args:
        stack (`torch.Tensor`): `[k, ...]`, finite.
        size (`torch.Tensor`): `[k]`, as [`sizes`] gives it.
    """
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    if is_known_at_once(size.device) and all(fits(each, stack[0].numel()) for each in size.tolist()):
        return wide
    return wide / power_of_two(size).view(-1, *[1] * (stack.ndim - 1))


def fits(size: float, numel: int) -> bool:
    """Whether float32 holds the squares of a gradient of that size and so many elements."""
    return LEAST_RMS * math.sqrt(max(1, numel)) < size < LARGEST_NORM


def normalized(flat: Tensor, resolution: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """
    GradNorm of gradients that are in range, and its norm.

    Args:
        flat (`torch.Tensor`): `[k, m, n]`, float32 or float64.
        resolution (`float`): Of the gradient's own dtype: relative deviations below it count as none.
        dtype (`torch.dtype`, *optional*): Of the result; that of `flat` by default.

    Returns:
        `(torch.Tensor, torch.Tensor)`: `[k, m, n]`, in memory as `flat` is, and `[k]`.
    """
    if is_transposed(flat):
        stored = flat.mT
        mean = stored.mean(-2, keepdim=True)
        centred = stored - mean
        deviation = centred.square().mean(-2, keepdim=True).sqrt_()
        kept = deviation > resolution * mean.abs()
        normed = _product(centred, kept / _nonzero(deviation), dtype or flat.dtype).mT
    else:
        # LayerNorm is GradNorm, and every backend has it in one pass. Its eps is below every square in range.
        normed, mean, inverse = torch.native_layer_norm(flat, flat.shape[-1:], None, None, 1e-37)
        kept = _deviates(mean, inverse, resolution)
        if is_known_at_once(kept.device) and bool(kept.all()):
            normed = normed.to(dtype or flat.dtype)
        else:
            normed = _product(normed, kept, dtype or flat.dtype)
    return normed, _norm_of(kept, flat)


def normalize_into(out: Tensor, sources: Sequence[Tensor], resolution: float) -> Tensor:
    """
    GradNorm of gradients on the CPU, by pieces that stay in its cache while they are worked on.

    Args:
        out (`torch.Tensor`): `[k, m, n]`, written: rounds to its dtype.
        sources (sequence of `torch.Tensor`): `k` matrices in range, `[m, n]`, in memory as those of `out` are.
        resolution (`float`): As in [`normalized`].

    Returns:
        `torch.Tensor`: `[k]`: the norms.
    """
    means, inverses = [], []
    transposed, width = is_transposed(out), max(1, out.shape[-2 if is_transposed(out) else -1])
    for source, there in zip(sources, out.unbind(0), strict=True):
        if transposed:
            mean, inverse = _normalize_columns(source.mT, there.mT)
            means.append(mean)
            inverses.append(inverse)
            continue
        for piece, place in zip(*rows_of(max(1, PIECE_NUMEL // width), source, there), strict=True):
            normed, mean, inverse = torch.native_layer_norm(wider(piece), piece.shape[-1:], None, None, 1e-37)
            place.copy_(normed)
            means.append(mean.view(-1))
            inverses.append(inverse.view(-1))
    kept = _deviates(torch.cat(means), torch.cat(inverses), resolution).view(*out.shape[:2], 1)
    if not bool(kept.all()):
        out.mul_(kept)
    return _norm_of(kept, out)


def _normalize_columns(stored: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """GradNorm of the columns of one matrix; their means and inverse deviations."""
    pieces, places = rows_of(max(1, PIECE_NUMEL // max(1, stored.shape[1])), stored, out)
    mean = torch.stack([wider(piece).sum(0) for piece in pieces]).sum(0).div_(len(stored))
    squares = [torch.sub(piece, mean).square_().sum(0) for piece in pieces]
    inverse = torch.stack(squares).sum(0).div_(len(stored)).sqrt_().reciprocal_()
    for piece, place in zip(pieces, places, strict=True):
        place.copy_(torch.sub(piece, mean).mul_(inverse.clamp(max=1e18)))
    return mean, inverse


def rows_of(count: int, *tensors: Tensor) -> list[Sequence[Tensor]]:
    """Tensors of equal length cut alike, `count` rows a piece."""
    return [[tensor] if len(tensor) <= count else tensor.split(count) for tensor in tensors]


def wider(tensor: Tensor) -> Tensor:
    """In float32 or float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_transposed(matrices: Tensor) -> bool:
    """Whether `[k, m, n]` lies column by column in memory."""
    return matrices.mT.is_contiguous() and not matrices.is_contiguous()


def _product(matrices: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype on the way out, without a pass of its own. `matrices` is written where it has that dtype."""
    out = matrices if matrices.dtype == dtype else torch.empty_like(matrices, dtype=dtype)
    return torch.mul(matrices, factors, out=out)


def _deviates(mean: Tensor, inverse: Tensor, resolution: float) -> Tensor:
    """Which rows have a deviation, of which the inverse is known."""
    return mean.abs().clamp_min_(1e-18 / resolution).mul_(inverse) < 1.0 / resolution


def _norm_of(kept: Tensor, normed: Tensor) -> Tensor:
    """Of matrices whose kept rows, `[k, m, 1]` or `[k, 1, m]`, have norm `sqrt(n)` and whose others are 0: `[k]`."""
    dtype = torch.promote_types(normed.dtype, torch.float32)
    return kept.sum((-2, -1), dtype=dtype).mul_(normed.shape[-1]).sqrt_()


def whitened(x: Tensor, method: Method, steps: int | None = None, beta: float | None = None) -> Tensor:
    """
    Whitens matrices whose elements are near 1 in size.

    Args:
        x (`torch.Tensor`): `[k, m, n]`, of the dtype to compute in.
        method (`str`): As in [`grad_whitening`].
        steps (`int`, *optional*): As in [`grad_whitening`].
        beta (`float`, *optional*): As in [`grad_whitening`].
    """
    if method != "nsds" and is_transposed(x):  # nsds tells rows from columns
        return whitened(x.mT, method, steps, beta).mT
    if min(x.shape[-2:]) <= SMALL_SIDE and x.dtype == torch.bfloat16:
        return whitened(x.float(), method, steps, beta).to(x.dtype)
    steps = DEFAULT_STEPS[method] if steps is None else steps
    beta = DEFAULT_BETA.get(method, 0.0) if beta is None else beta
    if method == "polar":
        return polar_factor(flatten_(x), steps)
    if method == "polar_express":
        return polar_factor(x, steps)
    if method == "nsds":
        return _nsds(x, beta)
    unit = x / _nonzero(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True))
    return _newton_schulz(unit, steps, beta) if method == "newton_schulz" else _svd(unit)


def factors_to(x: Tensor, target: Tensor) -> Tensor:
    """
    What matrices have to be multiplied by to have given norms; where one is zero, any number.

    Args:
        x (`torch.Tensor`): `[k, ...]`.
        target (`torch.Tensor`): `[k]`, float32 or float64; negative ones turn the sign.
    """
    return target / _nonzero(torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), dtype=target.dtype))


def power_of_two(size: Tensor) -> Tensor:
    """The next below, which takes no digit from what is divided by it; 1 in place of 0, inf and NaN."""
    known = torch.where((size > 0) & size.isfinite(), size, 1.0)
    return torch.ldexp(torch.ones_like(known), torch.frexp(known).exponent - 1)


def _nonzero(value: Tensor) -> Tensor:
    """Norms, and next to nothing in place of 0: what is divided by it is 0 there anyway."""
    return value.clamp_min(torch.finfo(value.dtype).tiny)


def _newton_schulz(unit: Tensor, steps: int, beta: float) -> Tensor:
    """
    `Z X` with `Z -> (X X^T)^(-1/2)`: Y <- beta Y T, Z <- beta T Z, T = 3 I - Z Y (the paper's Algorithm).

    `Z Y` of one singular value goes to `3 - 1 / beta`: to 1 for 0.5; at 0.8 that fixed point, 1.75, repels (slope
    -1.8), so that values circle it.
    """
    y = smaller_gram(unit)
    z = None  # the identity
    for step in range(steps):
        t = y.neg() if z is None else torch.bmm(z, y).neg_()
        t.diagonal(dim1=-2, dim2=-1).add_(3.0)
        z = t.mul(beta) if z is None else torch.bmm(t, z).mul_(beta)
        if step < steps - 1:
            y = torch.bmm(y, t).mul_(beta)
    assert z is not None  # there is at least one step
    return times_smaller(unit, z)


def _nsds(x: Tensor, beta: float) -> Tensor:
    """
    Two steps of the coupled iteration, the first with the diagonal in place of the Gram matrix, in closed form.

    With R = X X^T, d = diag(R) / tr R and z = beta (3 - d): Z = 3 beta diag(z) - beta z_i (R_ij / tr R) z_j^2;
    the result is Z X / ||X||_F.
    """
    root = smaller_gram(x)
    diagonal = root.diagonal(dim1=-2, dim2=-1).to(torch.promote_types(x.dtype, torch.float32))
    trace = diagonal.sum(-1, keepdim=True).clamp_min_(LEAST_NORM)
    z = beta * (3.0 - diagonal / trace)
    norm = trace.sqrt()
    left, right = (-beta / (trace * norm) * z).to(x.dtype).unsqueeze(-1), z.square().to(x.dtype).unsqueeze(-2)
    root.mul_(left).mul_(right).diagonal(dim1=-2, dim2=-1).add_((3.0 * beta * z / norm).to(x.dtype))
    # Z is not symmetric; the columns of a tall matrix are whitened by its transpose.
    return times_smaller(x, root.mT if x.shape[-2] > x.shape[-1] else root)


def _svd(unit: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(unit, full_matrices=False)
    # Centring leaves one direction of a square matrix empty but for rounding, which near-constant rows magnify.
    kept = s > s[..., :1] * torch.finfo(unit.dtype).eps ** (2 / 3)
    return (u * kept.to(unit.dtype).unsqueeze(-2)) @ vh
