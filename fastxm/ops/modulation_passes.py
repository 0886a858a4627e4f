"""Modulation as passes over memory: statistics and map, then sums and gradient.

`kernels` has the four passes: a `Native`, or the module fastxm.kernels.modulation.

    stats(x) -> mean, var [S, B, C]           of S equal pieces of each plane
    fwd(x, gamma, beta, mean, rstd, relu) -> out
    sums(dout, x, gamma, beta, mean, rstd, relu) -> dgamma, dbeta [S, B, C, h, w], in S terms
    dx(dout, x, gamma, beta, mean, rstd, p, q, relu) -> dx = g (1 + gamma) rstd - p - (x - mean) q
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch
from fastxm.ops.modulation_reference import as_inputs, layout

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def ready(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x dense; gamma and beta in its order, in its dtype if both are, else wide."""
    order = layout(x)
    if not gamma.dtype == beta.dtype == x.dtype:
        gamma, beta = (t.to(dispatch.wide_dtype(x)) for t in (gamma, beta))
    x, gamma, beta = (t.contiguous(memory_format=order) for t in (x, gamma, beta))
    return x, gamma, beta


def planes(t: Tensor, x: Tensor) -> Tensor:
    """A statistic of any grouping, as [B, C]."""
    return t.expand(*x.shape[:2], 1, 1).reshape(x.shape[:2]).contiguous()


def pieces(n: int, units: int, enough: int) -> int:
    """Into how many equal parts to split n, so that there are `enough` units: a power of two."""
    parts = 1
    while parts * units < enough and n % (2 * parts) == 0:
        parts *= 2
    return parts


class Fused:
    """The op by four passes, of one backend."""

    def __init__(self, name: str) -> None:
        triton = "fastxm.kernels.modulation"
        self.kernels: Any = importlib.import_module(triton) if name == "triton" else Native(name)

    def fwd(self, x, gamma, beta, mean, var, axes, eps, relu) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the statistics in the shape that broadcasts to x."""
        x, gamma, beta = ready(x, gamma, beta)
        if axes:
            mean, var = self.kernels.stats(x)
            dims = [0] + [i + 1 for i in axes if i < 2]
            between, mean = torch.var_mean(mean, dims, correction=0, keepdim=True)
            var = between + var.mean(dims, keepdim=True)
            mean, var = mean[0, :, :, None, None], var[0, :, :, None, None]
        rstd = torch.rsqrt(var + eps)
        out = self.kernels.fwd(x, gamma, beta, planes(mean, x), planes(rstd, x), relu)
        return out, mean, var

    def bwd(
        self, dout, x, gamma, beta, mean, var, axes, eps, relu
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, gamma and beta."""
        inputs = x, gamma, beta
        x, gamma, beta = ready(x, gamma, beta)
        dout = dout.to(x.dtype).contiguous(memory_format=layout(x))
        rstd = torch.rsqrt(var + eps)
        at = dout, x, gamma, beta, planes(mean, x), planes(rstd, x)
        dgamma, dbeta = (t.sum(0) if len(t) > 1 else t[0] for t in self.kernels.sums(*at, relu))
        p = q = torch.zeros_like(rstd)
        if axes:
            n = x.numel() // rstd.numel()
            scale = 1 + gamma.to(rstd.dtype)
            p = rstd * (scale * dbeta).sum(axes, keepdim=True) / n
            q = rstd.square() * (scale * dgamma).sum(axes, keepdim=True) / n
        dx = self.kernels.dx(*at, planes(p, x), planes(q, x), relu)
        return as_inputs(x, *zip((dx, dgamma, dbeta), inputs))


class Native:
    """The passes of fastxm._C, for CPU or CUDA tensors."""

    def __init__(self, name: str) -> None:
        self.enough = {"cpu": 32, "cuda": 1024}[name]  # units that keep the machine busy
        self.entry = getattr(_C, f"modulation_{name}")

    def run(
        self, number: int, x: Tensor, gamma: Tensor, parts: int, relu: bool, *addresses
    ) -> None:
        B, C, h, w = gamma.shape
        sizes = [DTYPES[x.dtype], DTYPES[gamma.dtype], B, C, h, w, x.shape[2] // h, parts,
                 layout(x) == torch.channels_last, relu]  # fmt: skip
        pointers = [0 if t is None else t.data_ptr() for t in addresses]
        cuda = x.device.type == "cuda"
        with torch.cuda.device_of(x):
            last = torch.cuda.current_stream().cuda_stream if cuda else dispatch.threads()
            self.entry(number, sizes, pointers, last)

    def stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, C, H, W = x.shape
        units = B if layout(x) == torch.channels_last else B * C
        parts = pieces(H * W, units, self.enough)
        shape, kind = (parts, B, C), dispatch.wide_dtype(x)
        mean, var = x.new_empty(shape, dtype=kind), x.new_empty(shape, dtype=kind)
        self.run(0, x, x, parts, False, None, x, *[None] * 7, mean, var)
        return mean, var

    def fwd(self, x, gamma, beta, mean, rstd, relu) -> Tensor:
        out = torch.empty_like(x)
        self.run(
            1, x, gamma, 1, relu, None, x, gamma, beta, mean, rstd, None, None, out, None, None
        )
        return out

    def sums(self, dout, x, gamma, beta, mean, rstd, relu) -> tuple[Tensor, Tensor]:
        B, C, h, w = gamma.shape
        last = layout(x) == torch.channels_last
        parts = pieces(x.shape[2] // h, B * h if last else B * C, self.enough)
        terms = [
            torch.empty((parts * B, C, h, w), dtype=mean.dtype, device=x.device,
                        memory_format=layout(x)).unflatten(0, (parts, B))
            for _ in range(2)
        ]  # fmt: skip
        tensors = dout, x, gamma, beta, mean, rstd, None, None, None, *terms
        self.run(2, x, gamma, parts, relu, *tensors)
        return terms[0], terms[1]

    def dx(self, dout, x, gamma, beta, mean, rstd, p, q, relu) -> Tensor:
        dx = torch.empty_like(x)
        self.run(3, x, gamma, 1, relu, dout, x, gamma, beta, mean, rstd, p, q, dx, None, None)
        return dx
