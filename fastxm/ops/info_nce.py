"""InfoNCE: the contrastive loss of paired rows, without their similarity matrix.

    s[i, j] = a[i] b[j] <x[i], y[j]>    a = scale, b = 1, or scale / |x[i]| and 1 / |y[j]|
    lse[i]  = log sum_j exp s[i, j]     t(i) = i + offset     e: label smoothing
    row[i]  = lse[i] - (1 - e) s[i, t(i)] - e mean_j s[i, j]
    loss[i] = row[i], or (row[i] + column[i]) / 2 with the same of s transposed if symmetric

Pairs (i, j) of one label with j != t(i) leave every sum and mean. Backward, with the weights v of
the rows and w of the columns (both dloss / 2 if symmetric, else dloss and 0):

    ds[i, j] = v[i] (exp(s[i, j] - lse[i]) - q[i, j])
             + w[j] (exp(s[i, j] - column_lse[j]) - q[j, i])
    q[i, j] = (1 - e) 1[j = t(i)] + e / count[i]
    g[i, j] = a[i] b[j] ds[i, j]        dx = g y, dy = gᵀ x, and more by rows (`info_nce_rows`)
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastxm.ops import dispatch, info_nce_op
from fastxm.ops.info_nce_op import store
from fastxm.ops.info_nce_ranks import across_ranks
from fastxm.ops.scalar import scalar


class Metrics(NamedTuple):
    """Of telling y given x, averaged with the other direction if symmetric: no gradient.

    accuracy: scalar in [0, 1], how often the positive scores highest. entropy: scalar in nats,
    the mean entropy of the softmax over candidates.
    """

    accuracy: Tensor
    entropy: Tensor


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
    stored_bytes: int = 64 << 20,
    return_metrics: bool = False,
) -> Any:  # a Tensor, but for return_metrics
    """Loss of telling each row's partner from every other row: CLIP's loss, NT-Xent, SimCLR.

    Args:
        x: [N, D], of any floating dtype; products are taken in it, with float32 accumulators.
        y: [M, D], M >= N. Row i of x matches row i + offset of y; every other row is a negative.
        logit_scale: inverse temperature, a number or a scalar tensor. Differentiable.
        symmetric: the average of telling y given x and x given y; needs M = N.
        normalize: of the rows' directions, x * rsqrt(max(sum x^2, 1e-12)), no row being rounded.
        labels: [M] integers, one a row of y (row i of x has labels[i + offset]): pairs of one
            label, but for the positive, are no negatives.
        label_smoothing: e in [0, 1): the share of the target spread evenly over all candidates.
        offset: where the positives begin in y, 0 <= offset <= M - N.
        reduction: "mean" | "sum" | "none". The mean of no rows is NaN, their sum 0.
        group: a torch.distributed group: each rank gives its own pairs (M = N, of any number) and
            labels, and meets the negatives of all in the memory of its own (`info_nce_ranks`).
            "mean" is then ranks / total rows * the sum of its own, so that the average over ranks,
            DistributedDataParallel's, is the whole mean. torch.compile breaks its graph there.
        stored_bytes: keep the products for the backward, which saves one of its three, where that
            is faster (`info_nce_op.store`) and they take no more than this.
        return_metrics: also give `Metrics`; they cost no further pass.

    Returns:
        scalar, or [N] for "none"; float32 (float64 for float64 inputs); with Metrics if asked for.

    Raises:
        ValueError: shapes or options do not fit together. TypeError: x or y is not floating, or
            tensors are on several devices.

    Source: van den Oord et al. 2018, eq. 4; Radford et al. 2021 (symmetric, learned scale).
    """
    _check(x, y, labels, symmetric or group is not None, label_smoothing, offset, reduction)
    scale = scalar("logit_scale", logit_scale, dispatch.wide_dtype(x, y), x.device)
    budget = stored_bytes if torch.is_grad_enabled() else 0
    given = (x, y, scale, normalize, labels, symmetric, label_smoothing)
    if group is not None:
        losses, statistics, rows = across_ranks(*given, group, budget)
    else:
        losses, *statistics = info_nce_op.losses(
            *given, offset, store(x, y, budget), return_metrics
        )
        rows = x.shape[0]
    if reduction == "mean" and group is None:
        loss = losses.mean()
    else:
        loss = losses if reduction == "none" else losses.sum()
        loss = loss / rows if reduction == "mean" else loss
    return (loss, _metrics(*statistics[: 1 + symmetric])) if return_metrics else loss


def _metrics(*statistics: Tensor) -> Metrics:
    entropy, hits = torch.stack([s[1:].mean(1) for s in statistics]).mean(0)
    return Metrics(hits, entropy)


def _check(x, y, labels, square, smoothing, offset, reduction) -> None:
    dispatch.one_device("info_nce", x, y, labels)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"info_nce needs x [N, D] and y [M, D], not {x.shape} and {y.shape}")
    if not x.is_floating_point() or not y.is_floating_point():
        raise TypeError(f"info_nce needs floating tensors, not {x.dtype} and {y.dtype}")
    N, M = x.shape[0], y.shape[0]
    if not 0 <= offset <= M - N or (square and N != M):
        raise ValueError(f"info_nce needs 0 <= offset <= M - N, and M = N if symmetric or of a "
                         f"group; N is {N}, M is {M}, offset is {offset}")  # fmt: skip
    if labels is not None and (labels.shape != (M,) or labels.is_floating_point()):
        raise ValueError(f"labels are integers [{M}], not {labels.dtype} {labels.shape}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing is in [0, 1), not {smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is mean, sum or none, not {reduction!r}")
