"""
Polar factors by products of matrices alone: odd quintics on the singular values, on the matrix or on its Gram matrix.

Source: Polar Express: Amsel, Persson, Musco, Gower, arXiv 2505.16932; the Gram form with restarts: Dao-AILab's Gram
Newton-Schulz; a randomized range finder and CholeskyQR: Halko, Martinsson, Tropp, arXiv 0909.4061.

A stack `[k, p, q]` is worked on as it lies: all products are of the smaller side, `X^T X` and `X Q` where `p > q` and
`X X^T` and `Q X` otherwise, so that no transposed copy is made. Nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tensors import is_accelerator


Quintics = tuple[tuple[float, float, float], ...]

# Odd quintic polynomials p(x) = a x + b x^3 + c x^5, each the best for the interval that the one before leaves (Polar
# Express, Algorithm 1), for singular values from l to 1: l = .1, .03, .01, .003, .001, 4e-4 for one to six of them,
# which they bring to 1 +- .45, .38, .27, .20, .12, .04. As its authors advise no interval is taken to begin below
# 0.018 of its end: the best polynomials would press some of the large values down to next to nothing, where bfloat16
# loses them.
OPTIMAL: dict[int, Quintics] = {
    1: ((5.603694506640494, -13.883690224017103, 9.733412622810349),),
    2: (
        (7.3625277580277935, -20.743395646172168, 15.16055175868458),
        (2.917538044229849, -2.182405382865042, 0.47552921925745756),
    ),
    3: (
        (8.034337759142334, -23.122381252490666, 17.00772323643739),
        (3.6404603227705965, -2.724727743009436, 0.5368648119553949),
        (2.666938353595364, -1.9817733780196456, 0.4531291836750546),
    ),
    4: (
        (8.26670605372989, -23.791124397167486, 17.499618867632513),
        (4.026319277381621, -2.970081034092954, 0.5599632641367401),
        (3.516799636769179, -2.6348638300336096, 0.5266517888901123),
        (2.5034067261854083, -1.8455669371202588, 0.4380757584359994),
    ),
    5: (
        (8.335611525934102, -23.989430548396403, 17.64548343492578),
        (4.130419427629785, -2.996707125669636, 0.5556810621547986),
        (3.9679375272757658, -2.9557606858558323, 0.5627362091810066),
        (3.306521159009599, -2.479613806029328, 0.5090439394397365),
        (2.2904339581810884, -1.659720811631465, 0.4178153725564589),
    ),
    6: (
        (8.356508414472076, -24.04957064186161, 17.689719625562915),
        (4.163087018936379, -3.005320943912481, 0.5544946712301076),
        (4.094522822469242, -2.987378794824025, 0.5570682947389269),
        (3.8008866236536596, -2.8399134552313146, 0.5499724211921846),
        (2.9348713296694293, -2.195981182370084, 0.4770526691526805),
        (2.0541003456765528, -1.437210235392236, 0.3941595112170839),
    ),
}
# Where the values are near 1: the first takes [.96, 1.04] to 1 +- 4e-5; the last is Newton-Schulz's of order five.
FINISHING: Quintics = ((1.8765615799748472, -1.2517339963828547, 0.3751734419254348), (1.875, -1.25, 0.375))
# For singular values from 1/64 to 1, which they bring to 1 +- .002.
_LEVELLING: Quintics = (
    (7.857050941404678, -22.612159562332533, 16.632428443021503),
    (3.3824158879340964, -2.536027085462324, 0.515435989803012),
    (2.3591139242734194, -1.720883471117583, 0.42444140078324016),
    (1.8978735149457013, -1.2751868310022278, 0.37752747022851246),
)
# Of the root mean square of the reciprocals of values `i^-1`, `i^-1/2` and the like, the smallest is about this part.
_LEVEL = 0.7
# Rounding can carry a singular value out of the interval, where the polynomials explode: they are applied to a matrix
# that is this much smaller. In bfloat16 the terms of the first ones, ten times larger than their sum, leave an error
# of up to 6%.
SAFETY = {torch.bfloat16: 1.07}
DEFAULT_SAFETY = 1.01
# Norms are taken for no smaller: the matrix is zero then, and products of what it is divided by must not overflow.
LEAST_NORM = 1e-16
# From this ratio of the sides on, iterating on the Gram matrix takes fewer operations than on the matrix.
GRAM_FROM = 1.45


def quintics(steps: int) -> Quintics:
    """
    The best `steps` polynomials: those of Polar Express, and from the seventh on such as finish.

    Args:
        steps (`int`): At least 1.
    """
    more = steps - len(OPTIMAL)
    return OPTIMAL[steps] if more <= 0 else OPTIMAL[len(OPTIMAL)] + FINISHING[:1] + FINISHING[1:] * (more - 1)


def polar_factor(x: Tensor, steps: int, group: int | None = None) -> Tensor:
    """
    `U V^T` of the thin SVD, near enough: `steps` quintics.

    Args:
        x (`torch.Tensor`): `[k, p, q]`, with elements near 1 in size, or all zero.
        steps (`int`): How many quintics.
        group (`int`, *optional*): How many of them are evaluated on one Gram matrix before it is made anew from the
            matrix. `None`: two. In bfloat16 a third takes singular values of real gradients up to 2.5 (of six
            polynomials to infinity), because by then the rounding of the Gram matrix, which is relative to the largest
            value, is as large as the square of the small ones. Nearly square matrices go one by one, which takes fewer
            operations.

    Returns:
        `torch.Tensor`: Same shape and dtype. A zero matrix gives zeros.
    """
    if group is None:
        rows, columns = min(x.shape[-2:]), max(x.shape[-2:])  # torch.compile can't trace a sort
        group = 1 if columns < GRAM_FROM * rows else 2
    coefficients = quintics(steps)
    for start in range(0, steps, group):
        some = coefficients[start : start + group]
        if start and len(some) == 1:
            x = _quintic(x, some[0])
        else:
            x = times_smaller(x, gram_root(smaller_gram(x), some, first=start == 0))
    return x


def _quintic(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """One polynomial of matrices within its interval, in three products that add up by themselves."""
    a, b, c = _safely(coefficients, x.dtype)
    gram = smaller_gram(x)
    curve = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    a = _add_now(curve, a)
    tall = x.shape[-2] > x.shape[-1]
    return torch.baddbmm(x, x, curve, beta=a) if tall else torch.baddbmm(x, curve, x, beta=a)


def gram_root(gram: Tensor, coefficients: Quintics, first: bool = True) -> Tensor:
    """
    `R^(-1/2)` of symmetric matrices, by quintics: `Q` such that `Q X` is the polynomial of `X`, where `R = X X^T`.

    Eigenvalues below the interval of the polynomials get at most the product of their first coefficients.

    Args:
        gram (`torch.Tensor`): `[k, m, m]`. Written.
        coefficients (tuple of triples): `a`, `b`, `c` of each.
        first (`bool`, *optional*, defaults to `True`): Whether the scale is open. It is then taken from
            `||R^2||_F^(1/4)`, the 8-norm of the singular values: it bounds the largest from above as `||X||` does, but
            tightly, and the product is needed anyway. Otherwise they are within the interval already.
    """
    root, scale, factor = _unscaled_root(gram, coefficients, first)
    return root if scale is None else root.mul_(scale.sqrt_() * factor)


def _unscaled_root(gram: Tensor, coefficients: Quintics, first: bool = True) -> tuple[Tensor, Tensor | None, float]:
    """
    As [`gram_root`], before it is multiplied by the root of numbers `[k, 1, 1]`, if there are any, and by a factor,
    which is negative.
    """
    # The ones at hand lack the factor, or its square: numbers are multiplied and not matrices.
    root, scale, factor = None, None, 1.0
    for index, each in enumerate(coefficients):
        a, b, c = _safely(each, gram.dtype)
        if first and index == 0:
            squared = torch.bmm(gram, gram)
            bound, inverse = _bounds(squared)
            # a + b / bound^(1/2) R + c / bound R^2 is b times what is made here, in the fewest passes
            gram, scale, factor = gram.mul_(inverse), inverse, b
            curve = torch.addcdiv(gram, squared, bound, value=c / b, out=squared)
            a = a / b
        else:
            curve = torch.baddbmm(gram, gram, gram, beta=b * factor**2, alpha=c * factor**4)
        if root is None:
            curve.diagonal(dim1=-2, dim2=-1).add_(a)
            a = 0.0
        else:
            a = _add_now(curve, a)
        if index + 1 < len(coefficients):  # the Gram matrix of p(X)
            half = torch.baddbmm(gram, gram, curve, beta=a)
            gram = torch.baddbmm(half, curve, half, beta=a)
        root = curve if root is None else torch.baddbmm(root, root, curve, beta=a)
    assert root is not None  # there is at least one
    return root, scale, factor


def _add_now(curve: Tensor, a: float) -> float:
    """
    The first term of a polynomial, a multiple of the identity: added to the others on the CPU, where a product that
    adds copies a matrix. Elsewhere the products add it, which spares a launch: what they have to add is returned.
    """
    if is_accelerator(curve):
        return a
    curve.diagonal(dim1=-2, dim2=-1).add_(a)
    return 0.0


def _safely(quintic: tuple[float, float, float], dtype: torch.dtype) -> tuple[float, float, float]:
    """A polynomial for a matrix that is a little smaller."""
    safety = SAFETY.get(dtype, DEFAULT_SAFETY)
    return quintic[0] / safety, quintic[1] / safety**3, quintic[2] / safety**5


def _bounds(squared: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius norms and the reciprocals of their roots, `[k, 1, 1]`."""
    wide = _wide(squared)
    if is_accelerator(squared):
        bound = torch.linalg.vector_norm(squared, dim=(-2, -1), keepdim=True, dtype=wide).clamp_min_(LEAST_NORM)
        return bound, bound.rsqrt()
    # The CPU sums up rows fast whatever their dtype is, but is slow at products of two dtypes. What is rounded to one
    # has to fit together.
    rows = torch.linalg.vector_norm(squared, dim=-1, keepdim=True)
    bound = torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True, dtype=wide).clamp_min_(LEAST_NORM)
    inverse = bound.rsqrt_().to(squared.dtype)
    return inverse.to(wide).pow(-2).to(squared.dtype), inverse


def flatten_(x: Tensor) -> Tensor:
    """
    Brings the largest directions of a matrix down to a common level, which is about that of the next one.

    One pass of a randomized range finder finds an orthonormal basis `U` of the `count` largest directions, and `U B^T`
    is replaced by `U (B^T B)^(-1/2) B^T` times the level, where `B = X^T U`. Only thin products are taken, so that it
    costs less than half a quintic, and spares three: the condition number falls to that of the rest. At most a
    64th of the largest value is the level.

    Args:
        x (`torch.Tensor`): `[k, p, q]`, contiguous. Written.

    Returns:
        `torch.Tensor`: `x`.
    """
    side = min(x.shape[-2:])
    count = max(side // 8, min(side, 16) // 2)
    if count < 2:
        return x
    tall = x.shape[-2] > x.shape[-1]
    # Thin matrices lie so that their longer side is a row, where products with them are fastest: [count, side], and
    # [count, longer side] or, of a tall matrix, [longer side, count].
    probes = _probes(side, count, x.device, x.dtype).expand(len(x), count, side)
    seen = torch.bmm(x, probes.mT) if tall else torch.bmm(probes, x)
    found = torch.bmm(seen.mT, x) if tall else torch.bmm(seen, x.mT)
    # bfloat16 rounds the basis anyway.
    basis = _orthonormal_rows(found.to(_wide(x)), 1 if x.dtype == torch.bfloat16 else 2)
    narrow = basis.to(x.dtype)
    thin = torch.bmm(x, narrow.mT) if tall else torch.bmm(narrow, x)
    wide = thin.to(_wide(x))
    root, _, _ = _unscaled_root(torch.bmm(wide.mT, wide) if tall else torch.bmm(wide, wide.mT), _LEVELLING)
    # The root's eigenvalues are the reciprocals of the values, so that its norm tells the smallest. Its scale is open,
    # and negative.
    level = _LEVEL * math.sqrt(count)
    root.div_(torch.linalg.vector_norm(root, dim=(-2, -1), keepdim=True))
    taken = torch.baddbmm(basis, root, basis, alpha=level).to(x.dtype)  # the root is symmetric
    return x.baddbmm_(thin, taken, alpha=-1.0) if tall else x.baddbmm_(taken.mT, thin, alpha=-1.0)


def _orthonormal_rows(vectors: Tensor, passes: int) -> Tensor:
    """
    An orthonormal basis of rows `[k, count, side]` (CholeskyQR, shifted); zeros where rounding leaves no basis.

    A second pass takes the basis from a few percent off to the last digits, where the first rows are a thousand
    times the last. Without it the same matrix with other last digits would come to another level.
    """
    basis = vectors
    for shift in (1e-5, 1e-6)[:passes]:
        gram = torch.bmm(basis, basis.mT)
        gram.diagonal(dim1=-2, dim2=-1).mul_(1.0 + shift)
        factor, failed = torch.linalg.cholesky_ex(gram)  # which does not read from the device, as a check would
        basis = torch.linalg.solve_triangular(factor, basis, upper=False)
        basis = basis.masked_fill_((failed != 0).view(-1, 1, 1), 0.0)
    return basis


# One for each size of matrix, device and dtype. No functools.cache: torch.compile warns of it.
_kept_probes: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}


def _probes(side: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random rows `[count, side]`, the same in every process and at every step."""
    key = (side, count, device, dtype)
    if key not in _kept_probes:
        _kept_probes[key] = _new_probes(side, count).to(device=device, dtype=dtype)
    return _kept_probes[key]


@torch.compiler.disable  # which can't trace a generator
def _new_probes(side: int, count: int) -> Tensor:
    columns = torch.randn(side, count, generator=torch.Generator().manual_seed(0))
    return columns.mT.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def smaller_gram(x: Tensor) -> Tensor:
    """`X^T X` or `X X^T`, the smaller."""
    return torch.bmm(x.mT, x) if x.shape[-2] > x.shape[-1] else torch.bmm(x, x.mT)


def times_smaller(x: Tensor, root: Tensor) -> Tensor:
    """`X Q` or `Q X`, as the smaller side is."""
    return torch.bmm(x, root) if x.shape[-2] > x.shape[-1] else torch.bmm(root, x)
