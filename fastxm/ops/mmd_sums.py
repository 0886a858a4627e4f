"""Weighted sums of a kernel over pairs: what the quadratic estimators of MMD are made from.

    S = c[0] sum a[i] a[j] k(x[i], x[j]) + c[1] sum b[i] b[j] k(y[i], y[j])
      + c[2] sum a[i] b[j] k(x[i], y[j])

S is a plain sum, so the forward that visits a pair also forms what the pair adds to the gradients,
where they are wanted; the backward only scales them. With p = K_xx a, q = K_xy b:

    da = 2 c[0] p + c[2] q        dx[i] = sum_j 2 c[0] a[i] a[j] grad k(x[i], x[j]) + ...
    dc = the three sums           dparameters = the sums with k's derivative in place of k
"""

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops.mmd_pairs import distances, off_diagonal, value
from fastxm.ops.mmd_tiles import Function, Rows, native, plain, visit

OFFERED = ("reference", "cpu")
TILE = {"reference": 2048, "cpu": 512}


def kernel_sum(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    parameters: Tensor,
    kind: str,
    degree: int,
    drop_self: bool,
    drop_paired: bool,
) -> Tensor:
    """S of the module docstring.

    Args:
        x, y: [N, D] and [M, D], float32 or float64, centred for a radial kernel.
        a, b: [N] and [M], weights of the rows.
        c: [3], float64, coefficients of the three sums.
        parameters, kind, degree: the kernel (see mmd_pairs).
        drop_self: leaves pairs of a row with itself out of the first two sums.
        drop_paired: leaves the pairs i = j out of the third.
    """
    if kind == "linear":
        return parameters[0, 0] * _linear(x, y, a, b, c, drop_self, drop_paired)
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, y, parameters)]
    return _fwd(x, y, a, b, c, parameters, kind, degree, drop_self, drop_paired, wanted)[0]


def _linear(x, y, a, b, c, drop_self: bool, drop_paired: bool) -> Tensor:
    """S of the kernel <x, y>: products of sums, in O(N D)."""

    def total(u: Tensor, v: Tensor, drop: bool) -> Tensor:
        whole = (u.sum(0) * v.sum(0)).sum()
        return whole - (u * v).sum() if drop else whole

    u, v = a[:, None] * x, b[:, None] * y
    sums = (total(u, u, drop_self), total(v, v, drop_self), total(u, v, drop_paired))
    return (c * torch.stack(sums)).sum().to(x.dtype)


def _formula(x, y, a, b, c, parameters, kind, degree, drop_self, drop_paired) -> Tensor:
    def total(x: Tensor, y: Tensor, a: Tensor, b: Tensor, same: bool, drop: bool) -> Tensor:
        s = x @ y.mT if kind == "polynomial" else distances(x, y, same)
        k = value(kind, s, parameters, degree)
        return a @ (k * off_diagonal(k) if drop else k) @ b

    sums = (total(x, x, a, a, True, drop_self), total(y, y, b, b, True, drop_self),
            total(x, y, a, b, False, drop_paired))  # fmt: skip
    return (c * torch.stack(sums)).sum().to(x.dtype)


@torch.library.custom_op("fastxm::mmd_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    parameters: Tensor,
    kind: str,
    degree: int,
    drop_self: bool,
    drop_paired: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend = dispatch.choose("mmd", x.device, _auto(x.device), OFFERED)
    # derivatives by the kernel's parameters are summed in PyTorch alone
    epilogue = native if backend == "cpu" and not wanted[2] else plain
    dparameters = torch.zeros_like(parameters)
    function = Function(kind, degree, parameters.contiguous(), dparameters if wanted[2] else None)
    xs = Rows.make(x, a.contiguous(), wanted[0])
    ys = Rows.make(y, b.contiguous(), wanted[1])
    how = (epilogue, TILE[backend])
    p, _ = visit(function, xs, xs, 2 * c[0], drop_self, *how)
    r, _ = visit(function, ys, ys, 2 * c[1], drop_self, *how)
    q, t = visit(function, xs, ys, c[2], drop_paired, *how)
    dots = [(u.double() * v.double()).sum() for u, v in ((a, p), (b, r), (a, q))]
    sums = torch.stack(dots)
    dx, dy = (_gradient(rows, kind) for rows in (xs, ys))
    total = (c * sums).sum().to(x.dtype)
    return (total, dx, dy, 2 * c[0] * p + c[2] * q, 2 * c[1] * r + c[2] * t, sums,
            dparameters)  # fmt: skip


def _gradient(rows: Rows, kind: str) -> Tensor:
    """dx, or an empty tensor where it is not wanted."""
    if rows.gradient is None:
        return rows.z.new_empty(0)
    return rows.gradient if kind == "polynomial" else rows.gradient.addcmul_(
        rows.slopes[:, None], rows.z, value=-1)  # fmt: skip


def _auto(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "reference"


@_fwd.register_fake
def _(x, y, a, b, c, parameters, kind, degree, drop_self, drop_paired, wanted):
    dx, dy = (torch.empty_like(z) if w else z.new_empty(0) for z, w in zip((x, y), wanted))
    return (x.new_empty(()), dx, dy, torch.empty_like(a), torch.empty_like(b),
            torch.empty_like(c), torch.empty_like(parameters))  # fmt: skip


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.options = inputs[6:10]


def _backward(ctx, dtotal, *_):
    inputs, gradients = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    if torch.is_grad_enabled():
        found = dispatch.vjp(lambda *t: _formula(*t, *ctx.options), inputs, [dtotal])
    else:
        found = [dtotal * g if need else None for g, need in zip(gradients, ctx.needs_input_grad)]
    return (*found, None, None, None, None, None)


_fwd.register_autograd(_backward, setup_context=_save)
