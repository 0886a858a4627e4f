"""Modulation in plain PyTorch: the formula that defines it, and its first derivative by hand."""

from typing import Any

import torch
from torch import Tensor

from fastxm.ops import dispatch, modulation_ranks
from fastxm.ops.vjp import vjp


def layout(x: Tensor) -> torch.memory_format:
    """The order that x is read in."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def cells(x: Tensor, gamma: Tensor) -> Tensor:
    """x by gamma's cells: [B, C, h, k, w, k]."""
    h, w = gamma.shape[2:]
    return x.unflatten(3, (w, -1)).unflatten(2, (h, -1))


def spread(gamma: Tensor) -> Tensor:
    """gamma as [B, C, h, 1, w, 1], which broadcasts to cells."""
    return gamma[:, :, :, None, :, None]


def fwd(x, gamma, beta, mean, var, axes, eps, relu, group) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the statistics in the shape that broadcasts to x."""
    wide, scale, shift = dispatch.wide(x, gamma, beta)
    if axes:
        var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        mean, var = modulation_ranks.pool(x, mean, var, group)
    kept = [t.to(dispatch.wide_dtype(x)) for t in (mean, var)]
    xhat = (wide - mean) * torch.rsqrt(var + eps)
    z = (cells(xhat, gamma) * (1 + spread(scale)) + spread(shift)).reshape(x.shape)
    out = torch.relu(z) if relu else z
    return out.to(x.dtype).contiguous(memory_format=layout(x)), *kept


def bwd(dout, x, gamma, beta, mean, var, axes, eps, relu, group) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gamma and beta."""
    g, wide, scale, shift = dispatch.wide(dout, x, gamma, beta)
    rstd = torch.rsqrt(var + eps)
    xhat = (wide - mean) * rstd
    g, by_cell, scale = cells(g, gamma), cells(xhat, gamma), 1 + spread(scale)
    if relu:
        g = g.masked_fill(by_cell * scale + spread(shift) <= 0, 0)
    dbeta, dgamma = g.sum((3, 5)), (g * by_cell).sum((3, 5))
    dx = (g * scale).reshape(x.shape)
    if axes:
        sums = [t.sum(axes, keepdim=True) for t in (dx, dx * xhat)]
        m1, m2 = modulation_ranks.means(x, sums, group)
        dx = dx - m1 - xhat * m2
    return as_inputs(x, (dx * rstd, x), (dgamma, gamma), (dbeta, beta))


def differentiable_bwd(dout, x, gamma, beta, *rest) -> list[Tensor | None]:
    """The same as the formula's own, to be differentiated again."""
    return vjp(lambda *maps: fwd(*maps, *rest)[0], (x, gamma, beta), (dout,))


def as_inputs(x: Tensor, *pairs: tuple[Tensor, Tensor]) -> Any:
    """Each gradient in the dtype of its input and the order of x."""
    return tuple(t.to(u.dtype).contiguous(memory_format=layout(x)) for t, u in pairs)
