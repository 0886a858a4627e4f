"""Kernels as functions of one statistic of a pair, in plain PyTorch: values, slopes, derivatives.

The statistic s of x and y is |x - y|^2 for a radial kernel, else <x, y>. A mixture is
sum_q weight[q] part(s, shape[q]); a polynomial (gamma s + coef0)^degree.

    grad_x k = slope (y - x) with slope = -2 dk/ds (radial),    slope y with slope = dk/ds (other)

`parameters` [2, K] holds shapes and weights, or gamma and coef0 with K = 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Values = float | Tensor | Sequence[float | Tensor]


class Part(NamedTuple):
    """One part of a mixture; k is its value, computed once."""

    value: Callable[[Tensor, Tensor], Tensor]  # of s, shape
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]  # of s, shape, k
    by_shape: Callable[[Tensor, Tensor, Tensor], Tensor]  # of s, shape, k


def vector(values: Values, like: Tensor) -> Tensor:
    """A number, a sequence or a tensor as [K], of the dtype and device of `like`."""
    if isinstance(values, Tensor):
        return values.to(like).reshape(-1)
    # filled, not copied from the host, so that CUDA graphs capture it
    items = values if isinstance(values, Sequence) else [values]
    return torch.stack([v.to(like).reshape(()) if isinstance(v, Tensor) else like.new_full((), v)
                        for v in items])  # fmt: skip


def positive(name: str, values: Values) -> None:
    """Raises ValueError unless every value is above 0; a CUDA tensor is not read, it would wait."""
    items = list(values) if isinstance(values, Sequence) else [values]
    if not items:
        raise ValueError(f"{name} must hold one value or more")
    for v in items:
        if not isinstance(v, Tensor):
            good = v > 0
        else:
            unread = v.device.type != "cpu" or torch.compiler.is_compiling()
            good = unread or (v.numel() > 0 and bool((v > 0).all()))
        if not good:
            raise ValueError(f"{name} must be above 0, not {values}")


def mixed(shapes: Tensor, weights: Values) -> Tensor:
    """[2, K] of shapes [K] and K weights, or one weight for all."""
    w = vector(weights, shapes)
    if w.numel() not in (1, shapes.numel()):
        raise ValueError(f"{shapes.numel()} parts need as many weights or one, not {w.numel()}")
    return torch.stack([shapes, w.expand_as(shapes)])


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


PRODUCTS = ("polynomial", "linear")
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


def value(kind: str, s: Tensor, parameters: Tensor, degree: int) -> Tensor:
    """The kernel at s, of the shape of s."""
    if kind in PRODUCTS:
        return (parameters[0] * s + parameters[1]) ** degree
    parts = [w * PARTS[kind].value(s, p) for p, w in parameters.unbind(1)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def slope(kind: str, s: Tensor, parameters: Tensor, degree: int) -> Tensor:
    """The slope at s, of the shape of s."""
    if kind in PRODUCTS:
        return degree * parameters[0] * (parameters[0] * s + parameters[1]) ** (degree - 1)
    part = PARTS[kind]
    total = torch.zeros_like(s)
    for p, w in parameters.unbind(1):
        total += w * part.slope(s, p, part.value(s, p))
    return total


def by_parameters(kind: str, s: Tensor, parameters: Tensor, degree: int) -> list[list[Tensor]]:
    """Derivatives of the kernel by each of the [2, K] parameters, each of the shape of s."""
    if kind in PRODUCTS:
        inner = degree * (parameters[0] * s + parameters[1]) ** (degree - 1)
        return [[inner * s], [inner]]
    part = PARTS[kind]
    values = [part.value(s, p) for p in parameters[0]]
    shapes = [w * part.by_shape(s, p, k) for k, (p, w) in zip(values, parameters.unbind(1))]
    return [shapes, values]
