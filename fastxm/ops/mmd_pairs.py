"""Kernels as functions of one statistic of a pair, in plain PyTorch: values, slopes, derivatives.

The statistic s of x and y is |x - y|^2 for a radial kernel, else <x, y>. A mixture is
sum_q weight[q] part(s, shape[q]); a polynomial (gamma s + coef0)^degree.

    grad_x k = slope (y - x) with slope = -2 dk/ds (radial),    slope y with slope = dk/ds (other)

The parameters of a kernel are K shapes and then K weights, or gamma and coef0 with K = 1; those of
a sum of kernels follow one another.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One part of a mixture; k is its value, computed once."""

    value: Callable[[Tensor, Tensor], Tensor]  # of s, shape
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]  # of s, shape, k
    by_shape: Callable[[Tensor, Tensor, Tensor], Tensor]  # of s, shape, k


def distances(x: Tensor, y: Tensor, same: bool = False) -> Tensor:
    """Squared distances [..., N, M] of rows, never below 0; `same`: exactly 0 on the diagonal."""
    d2 = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * (x @ y.mT)
    d2 = d2.clamp_min(0)
    return d2 * off_diagonal(d2) if same else d2


def off_diagonal(like: Tensor) -> Tensor:
    """[N, N], 0 on the diagonal and 1 elsewhere."""
    return 1 - torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def root(s: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    zero = s == 0
    return s.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def inverse_root(s: Tensor) -> Tensor:
    """1 / sqrt(s), and 0 at 0."""
    return torch.where(s == 0, torch.zeros_like(s), s.rsqrt())


def rational_by_shape(s: Tensor, alpha: Tensor, k: Tensor) -> Tensor:
    u = s / (2 * alpha)
    return k * (u / (1 + u) - torch.log1p(u))


KINDS = ("rbf", "rational_quadratic", "laplace", "energy", "polynomial")  # as csrc/mmd_pair.h


class Term(NamedTuple):
    """One kernel of a sum."""

    kind: int  # an index of KINDS
    degree: int  # of a polynomial; 4 where bandwidths halve: Gaussians are 4th powers of wider ones
    parts: int  # K

    @property
    def radial(self) -> bool:
        return KINDS[self.kind] != "polynomial"


PARTS = {
    "rbf": Part(
        lambda s, rate: torch.exp(-rate * s),
        lambda s, rate, k: 2 * rate * k,
        lambda s, rate, k: -s * k,
    ),
    "rational_quadratic": Part(
        lambda s, alpha: torch.exp(-alpha * torch.log1p(s / (2 * alpha))),
        lambda s, alpha, k: k / (1 + s / (2 * alpha)),
        rational_by_shape,
    ),
    "laplace": Part(
        lambda s, rate: torch.exp(-rate * root(s)),
        lambda s, rate, k: rate * k * inverse_root(s),
        lambda s, rate, k: -root(s) * k,
    ),
    "energy": Part(
        lambda s, scale: -scale * root(s),
        lambda s, scale, k: scale * inverse_root(s),
        lambda s, scale, k: -root(s),
    ),
}


def value(terms: Sequence[Term], s: Tensor, parameters: Tensor) -> Tensor:
    """The kernel at s, of the shape of s."""
    parts = []
    for term, shapes, weights in _each(terms, parameters):
        if not term.radial:
            parts.append((shapes * s + weights) ** term.degree)
            continue
        part = PARTS[KINDS[term.kind]]
        parts += [w * part.value(s, p) for p, w in zip(shapes.unbind(), weights.unbind())]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def slope(terms: Sequence[Term], s: Tensor, parameters: Tensor) -> Tensor:
    """The slope at s, of the shape of s."""
    total = torch.zeros_like(s)
    for term, shapes, weights in _each(terms, parameters):
        if not term.radial:
            inner = (shapes * s + weights) ** (term.degree - 1)
            total += term.degree * shapes * inner
            continue
        part = PARTS[KINDS[term.kind]]
        for p, w in zip(shapes.unbind(), weights.unbind()):
            total += w * part.slope(s, p, part.value(s, p))
    return total


def by_parameters(terms: Sequence[Term], s: Tensor, parameters: Tensor) -> list[Tensor]:
    """Derivatives of the kernel by each of the parameters, each of the shape of s."""
    found = []
    for term, shapes, weights in _each(terms, parameters):
        if not term.radial:
            inner = term.degree * (shapes * s + weights) ** (term.degree - 1)
            found += [inner * s, inner]
            continue
        part = PARTS[KINDS[term.kind]]
        values = [part.value(s, p) for p in shapes.unbind()]
        each = zip(values, shapes.unbind(), weights.unbind())
        found += [*(w * part.by_shape(s, p, k) for k, p, w in each), *values]
    return found


def _each(terms: Sequence[Term], parameters: Tensor) -> Iterator[tuple[Term, Tensor, Tensor]]:
    """Each term with its shapes and its weights, [K] each."""
    sizes = [2 * term.parts for term in terms]
    for term, own in zip(terms, parameters.split(sizes)):
        yield term, own[: term.parts], own[term.parts :]
