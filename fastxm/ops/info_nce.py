"""InfoNCE: the contrastive loss of paired rows, without keeping their similarity matrix.

    s[i, j] = scale <x[i], y[j]>        lse[i] = log sum_j exp s[i, j]        t(i) = i + offset
    row[i]  = lse[i] - (1 - e) s[i, t(i)] - e mean_j s[i, j]                  e: label smoothing
    loss[i] = row[i], or (row[i] + column[i]) / 2 with the same of s transposed if symmetric

Pairs (i, j) of one label with j != t(i) leave every sum and mean. Backward, with the weights a of
the rows and b of the columns (both dloss / 2 if symmetric, else dloss and 0):

    ds[i, j] = a[i] (exp(s[i, j] - lse[i]) - q[i, j])
             + b[j] (exp(s[i, j] - column_lse[j]) - q[j, i])
    q[i, j] = (1 - e) 1[j = t(i)] + e / count[i]
    dx = scale ds y        dy = scale dsᵀ x        dscale = <x, ds y>
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops import info_nce_blocks as blocks
from fastxm.ops.distributed import gather_rows, row_counts


def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    symmetric: bool = True,
    normalize: bool = False,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    offset: int = 0,
    reduction: str = "mean",
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Loss of telling each row's partner from every other row: CLIP's loss, NT-Xent, SimCLR.

    Args:
        x: [N, D], of any floating dtype.
        y: [M, D], M >= N. Row i of x matches row i + offset of y; every other row is a negative.
        logit_scale: inverse temperature, a number or a scalar tensor. Differentiable.
        symmetric: the average of telling y given x and x given y; needs M = N.
        normalize: L2-normalise the rows of x and y first, x * rsqrt(max(sum x^2, 1e-12)).
        labels: [M] integers, one a row of y (row i of x has labels[i + offset]): pairs of one
            label, but for the positive, are no negatives.
        label_smoothing: e in [0, 1): the share of the target spread evenly over all candidates.
        offset: where the positives begin in y, 0 <= offset <= M - N.
        reduction: "mean" | "sum" | "none". The mean of no rows is NaN, their sum 0.
        group: a torch.distributed group: each rank gives its own pairs (M = N, of any number) and
            labels, and meets the negatives of all. "mean" is then ranks / total rows * the sum of
            its own, so that the average over ranks, DistributedDataParallel's, is the whole mean.

    Returns:
        scalar, or [N] for "none"; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or options do not fit together. TypeError: x or y is not floating.

    Source: van den Oord et al. 2018, eq. 4; Radford et al. 2021 (symmetric, learned scale).
    """
    _check(x, y, labels, symmetric or group is not None, label_smoothing, offset, reduction)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    scale = torch.as_tensor(logit_scale, dtype=dtype, device=x.device).reshape(())
    if normalize:
        x, y = dispatch.unit_rows(x), dispatch.unit_rows(y)
    if group is not None:
        losses, rows = _across_ranks(x, y, scale, labels, symmetric, label_smoothing, group)
    else:
        losses = _fwd(x, y, scale, labels, symmetric, label_smoothing, offset)[0]
        rows = len(x)
    return losses if reduction == "none" else losses.sum() / (rows if reduction == "mean" else 1)


def _across_ranks(x, y, scale, labels, symmetric, smoothing, group) -> tuple[Tensor, float]:
    """The losses of this rank's rows among the rows of all, and how many rows a rank has."""
    counts = row_counts(len(x), x.device, group)
    labels = None if labels is None else gather_rows(labels, counts, group)
    options = (scale, labels, False, smoothing, sum(counts[: dist.get_rank(group)]))
    losses = _fwd(x, gather_rows(y, counts, group), *options)[0]
    if symmetric:
        losses = (losses + _fwd(y, gather_rows(x, counts, group), *options)[0]) / 2
    return losses, sum(counts) / len(counts)


def _check(x, y, labels, square, smoothing, offset, reduction) -> None:
    dispatch.one_device("info_nce", x, y, labels)
    N, M = len(x), len(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"info_nce needs x [N, D] and y [M, D], not {x.shape} and {y.shape}")
    if not x.is_floating_point() or not y.is_floating_point():
        raise TypeError(f"info_nce needs floating tensors, not {x.dtype} and {y.dtype}")
    if not 0 <= offset <= M - N or (square and N != M):
        raise ValueError(f"info_nce needs 0 <= offset <= M - N, and M = N if symmetric or of a "
                         f"group; N is {N}, M is {M}, offset is {offset}")  # fmt: skip
    if labels is not None and (labels.shape != (M,) or labels.is_floating_point()):
        raise ValueError(f"labels are integers [{M}], not {labels.dtype} {labels.shape}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing is in [0, 1), not {smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is mean, sum or none, not {reduction!r}")


@torch.library.custom_op("fastxm::info_nce_fwd", mutates_args=())
def _fwd(x: Tensor, y: Tensor, scale: Tensor, labels: Tensor | None, symmetric: bool,
         smoothing: float, offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    run = blocks.fwd if blocks.backend(x) == "cpu" else blocks.formula
    return run(x, y, scale, labels, symmetric, smoothing, offset)


@torch.library.custom_op("fastxm::info_nce_bwd", mutates_args=())
def _bwd(dloss: Tensor, x: Tensor, y: Tensor, scale: Tensor, labels: Tensor | None,
         row_lse: Tensor, column_lse: Tensor, kept: Tensor, symmetric: bool, smoothing: float,
         offset: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run = blocks.bwd if blocks.backend(x) == "cpu" else blocks.formula_bwd
    return run(dloss, x, y, scale, labels, row_lse, column_lse, kept, symmetric, smoothing, offset)


@_fwd.register_fake
def _(x, y, scale, labels, symmetric, smoothing, offset):
    shapes = (len(x), len(x), len(y) if symmetric else 0, blocks.kept_shape(x, y))
    return tuple(scale.new_empty(shape) for shape in shapes)


@_bwd.register_fake
def _(dloss, x, y, scale, *_):
    return tuple(torch.empty_like(t) for t in (x, y, scale))


def _save(ctx, inputs, output):
    x, y, scale, labels, *ctx.options = inputs
    ctx.save_for_backward(x, y, scale, labels, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dloss, *_):
    x, y, scale, labels, *kept = ctx.saved_tensors
    if torch.is_grad_enabled():
        grads = blocks.formula_vjp(dloss, x, y, scale, labels, *ctx.options)
    else:
        grads = _bwd(dloss, x, y, scale, labels, *kept, *ctx.options)
    return (*grads, None, None, None, None)


_fwd.register_autograd(_backward, setup_context=_save)
for _device in ("cpu", "cuda"):
    _fwd.register_autocast(_device, torch.float32)
