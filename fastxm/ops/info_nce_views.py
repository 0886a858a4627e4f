"""InfoNCE of two views of the same samples: every row among all others of both (NT-Xent).

    z = x above y, 2N rows      s[i, j] = scale f[i] f[j] <z[i], z[j]>      t(i) = i ± N
    loss[i] = log sum_{j != i} exp s[i, j] - s[i, t(i)]

s is symmetric: a product of some rows with other rows gives the sums of both, and its gradient
those of both. So half of the products are taken: x with y, where the positives are on the
diagonal, and of each view its first half with its second, and so on with the halves of those.
"""

import torch
from torch import Tensor

from fastxm.ops import dispatch, info_nce_op
from fastxm.ops import info_nce_reference as reference
from fastxm.ops.autograd import differentiable, gradient
from fastxm.ops.dispatch import no_autocast
from fastxm.ops.info_nce_rows import not_zero
from fastxm.ops.info_nce_sums import finish, join, new_sums, terms
from fastxm.ops.scalar import scalar

LEAF = 1024  # rows that meet each other in a whole square


def info_nce_views(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, *, normalize: bool = True
) -> Tensor:
    """Losses of telling each row's other view from all rows of both but itself.

    Args:
        x: [N, D], one view, of any floating dtype.
        y: [N, D], the other view of the same samples.
        logit_scale: inverse temperature, a number or a scalar tensor. Differentiable.
        normalize: of the rows' directions, as `info_nce` takes them.

    Returns:
        [2N], of the rows of x and then of y; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit together. TypeError: x or y is not floating, or tensors are
            on several devices.

    Source: Chen et al. 2020, eq. 1.
    """
    dispatch.one_device("info_nce_views", x, y)
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"two views are x [N, D] and y [N, D], not {x.shape} and {y.shape}")
    if not x.is_floating_point() or not y.is_floating_point():
        raise TypeError(f"info_nce_views needs floating tensors, not {x.dtype} and {y.dtype}")
    z = torch.cat([x, y])
    scale = scalar("logit_scale", logit_scale, dispatch.wide_dtype(z), z.device)
    return losses(z, scale, normalize)[0]


def _triangle(here: slice) -> list[tuple[slice, slice]]:
    """Pairs of slices that hold each pair of different rows once, but a square of few rows."""
    n = here.stop - here.start
    if n <= LEAF:
        return [(here, here)]
    middle = here.start + n // 2
    first, second = slice(here.start, middle), slice(middle, here.stop)
    return [(first, second), *_triangle(first), *_triangle(second)]


def _pairs(z: Tensor, factor: Tensor, scale: Tensor) -> list[tuple[slice, slice, tuple]]:
    """What the backends' `sums` and `gradients` take of each pair of slices."""
    N = z.shape[0] // 2
    x, y = slice(0, N), slice(N, 2 * N)
    rows = torch.arange(2 * N, device=z.device)
    pairs = []
    for p, q in [(x, y), *_triangle(x), *_triangle(y)]:
        # a row has a label of its own, which takes it out of a square; there are no positives there
        labels = (rows[p], rows[p]) if p == q else (None, None)
        offset = 0 if (p, q) == (x, y) else q.stop - q.start
        pairs.append((p, q, (z[p], z[q], scale * factor[p], factor[q], *labels, offset)))
    return pairs


def _losses(z: Tensor, scale: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Losses [2N] and log-sum-exps [2N]."""
    backend = info_nce_op.backend(z, z)
    with no_autocast(z):
        factor = _factor(z, scale, normalize)
        sums = new_sums(factor).repeat(1, z.shape[0])
        for p, q, given in _pairs(z, factor, scale):
            row, column, _ = backend.sums(*given, False, 2)
            sums[:, p] = join(sums[:, p], row[:5])
            if p != q:
                sums[:, q] = join(sums[:, q], column)
            if q.start - p.start == z.shape[0] // 2:
                positive = row[5].repeat(2)
        loss, statistics = finish(sums, positive, 0, 1)
    return loss, statistics[0].clone()


def _gradients(
    dloss: Tensor, z: Tensor, scale: Tensor, lse: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    backend, every = info_nce_op.backend(z, z), terms(lse, dloss, 0, 1)
    scale = not_zero(scale)
    with no_autocast(z):
        factor = _factor(z, scale, normalize)
        dz = factor.new_zeros(z.shape)
        for p, q, given in _pairs(z, factor, scale):
            row, column = every[:, p].contiguous(), every[:, q].contiguous()
            grads = backend.gradients(row, None if p == q else column, *given, 0.0, z[:0])
            for of, grad in zip((p, q), grads):
                dz[of] += grad
        dz, along = backend.finish(z, dz, factor if normalize else None)
    return dz, along.sum() / (2 * scale)  # a product is of two rows


losses_of = torch.library.custom_op("fastxm::info_nce_views_fwd", _losses, mutates_args=())
gradients_of = torch.library.custom_op("fastxm::info_nce_views_bwd", _gradients, mutates_args=())


def _factor(z: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    if normalize:
        return info_nce_op.backend(z, z).rnorms(z, z[:0])
    return torch.ones_like(scale).expand(z.shape[0])


@losses_of.register_fake
def _(z, scale, normalize):
    return scale.new_empty(z.shape[0]), scale.new_empty(z.shape[0])


@gradients_of.register_fake
def _(dloss, z, scale, *options):
    return z.new_empty(z.shape), scale.new_empty(())


def _save(ctx, inputs, output):
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dloss, _):
    *inputs, lse = ctx.saved_tensors
    return (*gradients(dloss, *inputs, lse, ctx.normalize), None)


gradients = gradient(gradients_of, _gradients, reference.differentiable_views_bwd)
losses = differentiable(losses_of, _losses, _save, _backward, reference.views)
