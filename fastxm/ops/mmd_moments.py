"""Sums of the rows of a kernel's matrices and of their squares, of which MMD's variance is made.

    a = Kxx 1    b = Kyy 1    p = Kxy 1    q = Kxy' 1    s = (|Kxx|^2, |Kyy|^2, |Kxy|^2)

with 0 for the diagonals of Kxx and Kyy. The backward makes the matrices again, a block at a time,
as the gradient of a value of theirs needs the sums of all:

    da[i] + 2 ds[0] k  in Kxx     db[i] + 2 ds[1] k  in Kyy     dp[i] + dq[j] + 2 ds[2] k  in Kxy
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastxm.ops import dispatch, mmd_moments_reference
from fastxm.ops.autograd import differentiable, gradient
from fastxm.ops.mmd_backends import TILE, tf32
from fastxm.ops.mmd_pairs import Term
from fastxm.ops.mmd_reference import unpack
from fastxm.ops.mmd_rows import Function, Rows, finish
from fastxm.ops.mmd_tiles import native, visit
from fastxm.ops.vjp import vjp


def _forward(
    x: Tensor, y: Tensor, parameters: Tensor, terms: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a, b, p, q [N] and s [3] of the module docstring, float64.

    Args:
        x, y: [N, D], contiguous, float32 or float64; centred for radial kernels.
        parameters: [P], of x's dtype, of all terms.
        terms: the kernel (`Term`), three numbers each, of any kinds.
    """
    kernel = unpack(terms)
    if not _by_tiles(x, kernel):
        with tf32(x.device, False):
            return mmd_moments_reference.formula(kernel, x, y, parameters)
    (u, v), squares, one = _rows(x, y, (False, False)), x.new_zeros(3).double(), x.new_ones(())
    functions = [Function(kernel, parameters, squares=s) for s in squares]
    how = (native, TILE["cpu"])
    a, _ = visit(functions[0], u, u, one, True, *how)
    b, _ = visit(functions[1], v, v, one, True, *how)
    p, q = visit(functions[2], u, v, one, False, *how)
    return a, b, p, q, squares * squares.new_tensor([2, 2, 1])


_fwd = torch.library.custom_op("fastxm::mmd_moments_fwd", _forward, mutates_args=())


@_fwd.register_fake
def _(x, y, parameters, terms):
    sums = [x.new_empty(x.shape[0], dtype=torch.float64) for _ in range(4)]
    return (*sums, x.new_empty(3, dtype=torch.float64))


def _work(
    x: Tensor, y: Tensor, parameters: Tensor, da: Tensor, db: Tensor, dp: Tensor, dq: Tensor,
    ds: Tensor, terms: list[int], wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx and dy, if wanted (else they may be empty), and dparameters."""
    kernel, cotangents = unpack(terms), [da, db, dp, dq, ds]
    if not _by_tiles(x, kernel):
        with tf32(x.device, False):
            return mmd_moments_reference.gradients(kernel, x, y, parameters, cotangents)
    (u, v), by = _rows(x, y, wanted), ds.new_zeros(parameters.shape[0])
    function = Function(kernel, parameters, by if wanted[2] else None)
    # of (i, j) and (j, i) together in the first two
    functions = [replace(function, square=s) for s in ds * ds.new_tensor([4, 4, 2])]
    how = (native, TILE["cpu"])
    visit(functions[0], u, u, da, True, *how)
    visit(functions[1], v, v, db, True, *how)
    visit(functions[2], u, v, dp, False, *how, dq)
    radial = function.radial
    return finish(u, x, radial), finish(v, y, radial), by.to(parameters)


_bwd = torch.library.custom_op("fastxm::mmd_moments_bwd", _work, mutates_args=())


@_bwd.register_fake
def _(x, y, parameters, da, db, dp, dq, ds, terms, wanted):
    dx, dy = (z.new_empty(z.shape if w else 0) for z, w in zip((x, y), wanted))
    return dx, dy, torch.empty_like(parameters)


def _by_tiles(x: Tensor, terms: list[Term]) -> bool:
    """By C++ on a CPU, for functions of one statistic of a pair."""
    auto = "cpu" if x.device.type == "cpu" else "reference"
    name = dispatch.choose("mmd2_and_variance", x.device, auto, ("reference", "cpu"))
    return name == "cpu" and len({term.radial for term in terms}) == 1


def _rows(x: Tensor, y: Tensor, wanted: Sequence[bool]) -> list[Rows]:
    return [Rows.make(z, z, z.new_ones(z.shape[0]), w, True) for z, w in zip((x, y), wanted)]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.terms = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, *cotangents):
    wanted, dense = [*ctx.needs_input_grad[:3]], (t.contiguous() for t in cotangents)
    found = _gradients(*ctx.saved_tensors, *dense, ctx.terms, wanted)
    return (*(g if w else None for g, w in zip(found, wanted)), None)


def _formula(x, y, parameters, terms) -> tuple[Tensor, ...]:
    with tf32(x.device, False):
        return mmd_moments_reference.formula(unpack(terms), x, y, parameters)


def _differentiable(x, y, parameters, *given):
    *cotangents, terms, _ = given
    return vjp(partial(_formula, terms=terms), (x, y, parameters), cotangents)


_gradients = gradient(_bwd, _work, _differentiable)
moments = differentiable(_fwd, _forward, _save, _backward, _formula)
