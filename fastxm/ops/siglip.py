"""The sigmoid loss of paired rows (SigLIP), without their similarity matrix.

    s[i, j] = scale <x[i], y[j]> + bias       z[i, j] = 1 where i = j, else -1
    loss    = sum_ij log(1 + exp(-z[i, j] s[i, j])) / N

Backward: ds = -z sigmoid(-z s) / N, dx = scale ds y, dy = scale dsᵀ x. The gradient of a pair
needs nothing but the pair: it is taken in the forward, block by block of rows, so that each
product is made once. Across ranks the rows of y go round (`ring.turn`), and again in the backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastxm.ops import ring
from fastxm.ops.autograd import differentiable, gradient
from fastxm.ops.dispatch import no_autocast, one_device, wide_dtype
from fastxm.ops.distributed import gather_rows, row_counts
from fastxm.ops.scalar import scalar
from fastxm.ops.siglip_pairs import differentiable_bwd, formula, pair_sums, scaled
from fastxm.ops.vjp import vjp


def siglip(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Loss of telling for each pair of rows whether they are partners, a row on average.

    Args:
        x: [N, D], of any floating dtype, as a rule normalised.
        y: [N, D]. Row i of x matches row i of y.
        logit_scale: inverse temperature, a number or a scalar tensor. Differentiable.
        logit_bias: added to the logits, a number or a scalar tensor. Differentiable.
        group: a torch.distributed group, with pairs of each rank and the mean as in `info_nce`.

    Returns:
        scalar, float32 (float64 for float64 inputs): the sum over pairs divided by N.

    Raises:
        ValueError: shapes do not fit together. TypeError: x or y is not floating, or tensors are
            on several devices.

    Source: Zhai et al. 2023, eq. 1.
    """
    one_device("siglip", x, y)
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"siglip needs x [N, D] and y [N, D], not {x.shape} and {y.shape}")
    if not x.is_floating_point() or not y.is_floating_point():
        raise TypeError(f"siglip needs floating tensors, not {x.dtype} and {y.dtype}")
    dtype = wide_dtype(x, y)
    scale = scalar("logit_scale", logit_scale, dtype, x.device)
    bias = scalar("logit_bias", logit_bias, dtype, x.device)
    if group is None:
        return losses(x, y, scale, bias, torch.is_grad_enabled())[0] / x.shape[0]
    return _across_ranks(x, y, scale, bias, group)


def _loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, gradients: bool,
          ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum over all pairs, and its gradients to the four tensors, or empty ones: wide, for the
    sum's may be beyond float16 where the mean's are not."""
    with no_autocast(x):
        loss, found = pair_sums(x, y, scale, bias, True, gradients)
    dx, dy, dscale, dbias = found or (loss.new_empty(0) for _ in range(4))
    return loss, dx, dy, dscale, dbias


loss_of = torch.library.custom_op("fastxm::siglip", _loss, mutates_args=())


@loss_of.register_fake
def _(*inputs):
    *tensors, gradients = inputs
    wide = tensors[2]
    return tuple(wide.new_empty(shape) for shape in
                 ((), *(t.shape if gradients else (0,) for t in tensors)))  # fmt: skip


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * len(ctx.needs_input_grad)
    return *gradients(dloss, *ctx.saved_tensors), None


gradients = gradient(None, scaled, differentiable_bwd)
losses = differentiable(loss_of, _loss, _save, _backward, lambda *given: (formula(*given[:4]),))


@torch.compiler.disable
def _across_ranks(x, y, scale, bias, group) -> Tensor:
    counts = row_counts(x.shape[0], x.device, group)
    with no_autocast(x):
        loss = _Ranks.apply(x, y, scale, bias, counts, group)
    return loss * len(counts) / sum(counts)


class _Ranks(torch.autograd.Function):
    """The sum over the pairs of this rank's x with the y of all."""

    @staticmethod
    def forward(ctx: Any, x, y, scale, bias, counts: Sequence[int], group) -> Tensor:
        ctx.save_for_backward(x, y, scale, bias)
        ctx.counts, ctx.group = counts, group
        loss = torch.zeros_like(scale)

        def visit(chunk, own):
            loss.add_(pair_sums(x, chunk[0], scale, bias, own, False)[0])
            return []

        ring.turn([y], counts, group, visit, torch.add)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        inputs = x, y, scale, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            start = sum(ctx.counts[: dist.get_rank(ctx.group)])

            def across(x, y, scale, bias):
                return formula(x, gather_rows(y, ctx.counts, ctx.group), scale, bias, start)

            return *vjp(across, inputs, (dloss,)), None, None
        grads = [t.new_zeros(t.shape, dtype=scale.dtype) for t in (x, scale, bias)]

        def visit(chunk, own):
            _, (dx, dy, dscale, dbias) = pair_sums(x, chunk[0], scale, bias, own, True)
            for total, grad in zip(grads, (dx, dscale, dbias)):
                total.add_(dloss * grad)
            return [dloss * dy]

        (dy,) = ring.turn([y], ctx.counts, ctx.group, visit, torch.add)
        dx, dscale, dbias = grads
        return dx.to(x.dtype), dy.to(y.dtype), dscale, dbias, None, None
