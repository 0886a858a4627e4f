"""Weighted sums of a kernel over pairs: what the quadratic estimators of MMD are made from.

    S = c[0] sum a[i] a[j] k(x[i], x[j]) + c[1] sum b[i] b[j] k(y[i], y[j])
      + c[2] sum a[i] b[j] k(x[i], y[j])

of one problem, or of each of G. S is a plain sum, so the forward that visits a pair also forms what
the pair adds to the gradients, where they are wanted; the backward only scales them. With p = K_xx
a, q = K_xy b:

    da = 2 c[0] p + c[2] q        dx[i] = sum_j 2 c[0] a[i] a[j] grad k(x[i], x[j]) + ...
    dc = the three sums           dparameters = the sums with k's derivative in place of k
"""

import torch
from torch import Tensor

from fastxm.ops import mmd_reference
from fastxm.ops.autograd import differentiable, gradient
from fastxm.ops.dispatch import no_autocast
from fastxm.ops.mmd_backends import forward, tf32
from fastxm.ops.mmd_problems import per_row
from fastxm.ops.mmd_reference import Options
from fastxm.ops.vjp import vjp


def kernel_sums(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    parameters: Tensor,
    x_starts: Tensor | None,
    y_starts: Tensor | None,
    options: Options,
) -> Tensor:
    """S of the module docstring, of each problem.

    Args:
        x, y: [N, D] and [M, D], of any floating dtype, of all problems one below the other.
        a, b: [N] and [M], float32 or float64, weights of the rows.
        c: [G, 3], float64, coefficients of the three sums.
        parameters: [P], of a's dtype, of all terms.
        x_starts, y_starts: [G + 1] integers on the CPU, where the rows of each problem begin and
            the last one's end; None for one problem.

    Returns:
        [G], of a's dtype.
    """
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, y, parameters)]
    return _sums(x, y, a, b, c, parameters, x_starts, y_starts, *options, wanted)[0]


def _forward(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    parameters: Tensor,
    x_starts: Tensor | None,
    y_starts: Tensor | None,
    terms: list[int],
    drop_self: bool,
    drop_paired: bool,
    precision: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """S [G], and the gradients of each problem's: dx, dy, da, db, dc [G, 3], dparameters [G, P]."""
    inputs = (x, y, a.contiguous(), b.contiguous(), c, parameters)
    options = Options(terms, drop_self, drop_paired, precision)
    with no_autocast(x):
        return forward(inputs, (x_starts, y_starts), options, wanted)


_fwd = torch.library.custom_op("fastxm::mmd_fwd", _forward, mutates_args=())


@_fwd.register_fake
def _(x, y, a, b, c, parameters, x_starts, y_starts, terms, self, paired, precision, wanted):
    dx, dy = (z.new_empty(z.shape if w else 0, dtype=a.dtype) for z, w in zip((x, y), wanted))
    G = c.shape[0]
    return (a.new_empty(G), dx, dy, torch.empty_like(a), torch.empty_like(b),
            torch.empty_like(c), c.new_empty(G, parameters.shape[0]))  # fmt: skip


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.options = inputs[8:12]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of outputs as large as the inputs


def _backward(ctx, dtotal, *_):
    if dtotal is None:
        return (None,) * 13
    saved, options = ctx.saved_tensors, ctx.options
    return (*_gradients(dtotal, *saved, *options, ctx.needs_input_grad[:6]), *(None,) * 7)


def _scaled(dtotal, *given):
    inputs, starts, (dx, dy, da, db, dc, dparameters) = given[:6], given[6:8], given[8:14]
    x_of, y_of = (per_row(dtotal, s, d.shape[0]) for s, d in zip(starts, (da, db)))
    ready = (lambda: x_of[..., None] * dx, lambda: y_of[..., None] * dy, lambda: x_of * da,
             lambda: y_of * db, lambda: dtotal[:, None] * dc,
             lambda: (dtotal.double() @ dparameters))  # fmt: skip
    return tuple(f().to(t.dtype) if need else None
                 for f, t, need in zip(ready, inputs, given[-1]))  # fmt: skip


def _formula(*given):
    inputs, starts, options = given[:6], given[6:8], Options(*given[8:12])
    with no_autocast(inputs[0]), tf32(inputs[0].device, options.precision == "tf32"):
        return (mmd_reference.kernel_sums(starts, options, *inputs),)


def _differentiable(dtotal, *given):
    rest = (*given[6:8], *given[14:])
    return vjp(lambda *inputs: _formula(*inputs, *rest), given[:6], (dtotal,), given[-1])


_gradients = gradient(None, _scaled, _differentiable)
_sums = differentiable(_fwd, _forward, _save, _backward, _formula)
