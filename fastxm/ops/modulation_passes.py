"""Modulation in four passes over memory: statistics and map, then sums and gradient.

    stats   mean, var [parts, B, C]  of equal pieces of each plane of x
    fwd     out                      from x, gamma, beta, mean, rstd [B, C]
    sums    dgamma, dbeta [parts, B, C, h, w], in as many terms; from dout too
    dx      g (1 + gamma) rstd - p - (x - mean) q; p, q [B, C]

What lies between the passes is small, and the same for the C++, CUDA and Triton kernels.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch, gemm, modulation_ranks
from fastxm.ops.modulation_reference import as_inputs, layout

PASSES = ("stats", "fwd", "sums", "dx")
TENSORS = ("dout", "x", "gamma", "beta", "mean", "rstd", "p", "q", "out", "first", "second")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Fused:
    """The op on one backend: "cpu", "cuda" or "triton"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.enough = 32 if name == "cpu" else 1024  # units of work that keep a machine busy

    def fwd(
        self, x, gamma, beta, mean, var, axes, eps, relu, group
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the statistics in the shape that broadcasts to x."""
        x, gamma, beta = _ready(x, gamma, beta)
        if axes:
            mean, var = self.statistics(x, axes)
            mean, var = modulation_ranks.pool(x, mean, var, group)
        out = torch.empty_like(x)
        rstd = torch.rsqrt(var + eps)
        self.run("fwd", relu, 1, x=x, gamma=gamma, beta=beta, mean=_planes(mean, x),
                 rstd=_planes(rstd, x), out=out)  # fmt: skip
        return out, mean, var

    def statistics(self, x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over axes, which stay with size 1."""
        (B, C, H, W), dtype = x.shape, dispatch.wide_dtype(x)
        parts = _pieces(H * W, B if _last(x) else B * C, self.enough, x.numel())
        mean, var = (x.new_empty((parts, B, C), dtype=dtype) for _ in range(2))
        self.run("stats", False, parts, x=x, first=mean, second=var)
        dims = [0] + [i + 1 for i in axes if i < 2]
        between, mean = torch.var_mean(mean, dims, correction=0, keepdim=True)
        var = between + var.mean(dims, keepdim=True)
        return mean[0, :, :, None, None], var[0, :, :, None, None]

    def bwd(self, dout, x, gamma, beta, mean, var, axes, eps, relu, group) -> Any:
        """The gradients of x, gamma and beta."""
        inputs = x, gamma, beta
        x, gamma, beta = _ready(x, gamma, beta)
        dout = dout.to(x.dtype).contiguous(memory_format=layout(x))
        rstd = torch.rsqrt(var + eps)
        at = {"dout": dout, "x": x, "gamma": gamma, "beta": beta, "mean": _planes(mean, x),
              "rstd": _planes(rstd, x)}  # fmt: skip
        dgamma, dbeta = self.sums(relu, at)
        p = q = torch.zeros_like(rstd)
        if axes:
            scale = 1 + gamma.to(rstd.dtype)
            sums = [(scale * t).sum(axes, keepdim=True) for t in (dbeta, dgamma)]
            m1, m2 = modulation_ranks.means(x, sums, group)
            p, q = rstd * m1, rstd.square() * m2
        dx = torch.empty_like(x)
        self.run("dx", relu, 1, **at, p=_planes(p, x), q=_planes(q, x), out=dx)
        return as_inputs(x, *zip((dx, dgamma, dbeta), inputs))

    def sums(self, relu: bool, at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """dgamma and dbeta [B, C, h, w], wide."""
        x, (B, C, h, w) = at["x"], at["gamma"].shape
        units = B * h if _last(x) else B * C
        parts = _pieces(x.shape[2] // h, units, self.enough, x.numel())
        shape, dtype = (parts * B, C, h, w), dispatch.wide_dtype(x)
        dgamma, dbeta = (
            torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout(x))
            for _ in range(2)
        )
        self.run("sums", relu, parts, **at, first=dgamma, second=dbeta)
        if parts > 1:
            dgamma, dbeta = (t.unflatten(0, (parts, B)).sum(0) for t in (dgamma, dbeta))
        return dgamma, dbeta

    def run(self, name: str, relu: bool, parts: int, **tensors: Tensor) -> None:
        """One pass: fills `out`, or `first` and `second`."""
        x, at = tensors["x"], [tensors.get(key) for key in TENSORS]
        with torch.cuda.device_of(x):
            if self.name == "triton":
                kernels = importlib.import_module("fastxm.kernels.modulation")
                getattr(kernels, name)(*at, _last(x), relu, parts)
                return
            gamma = tensors.get("gamma", x)
            sizes = [DTYPES[x.dtype], DTYPES[gamma.dtype], *gamma.shape,
                     x.shape[2] // gamma.shape[2], parts, _last(x), relu]  # fmt: skip
            addresses = [0 if t is None else t.data_ptr() for t in at]
            if self.name == "cpu":
                _C.modulation_cpu(PASSES.index(name), sizes, addresses, dispatch.threads())
            else:
                _C.modulation_cuda(PASSES.index(name), sizes, addresses, gemm.stream(x))


def _ready(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # x dense; gamma and beta in its order, in its dtype if both are, else wide
    order = layout(x)
    if not gamma.dtype == beta.dtype == x.dtype:
        gamma, beta = (t.to(dispatch.wide_dtype(x)) for t in (gamma, beta))
    x, gamma, beta = (t.contiguous(memory_format=order) for t in (x, gamma, beta))
    return x, gamma, beta


def _last(x: Tensor) -> bool:
    return layout(x) == torch.channels_last


def _planes(t: Tensor, x: Tensor) -> Tensor:
    # a statistic of any grouping, as [B, C]
    return t.expand(*x.shape[:2], 1, 1).reshape(x.shape[:2]).contiguous()


def _pieces(n: int, units: int, enough: int, values: int) -> int:
    # into how many equal parts to split n: a power of two, until there are `enough` units of work
    # or they have few values each; so by the sizes alone, and sums are the same on any machine
    parts = 1
    while parts * units < enough and n % (2 * parts) == 0 and values // (2 * parts * units) >= 4096:
        parts *= 2
    return parts
