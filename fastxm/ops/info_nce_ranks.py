"""InfoNCE across the ranks of a torch.distributed group, each of which keeps its own rows.

Forward: the rows of y go round, and every rank takes their products with its x: the sums of rows
stay with x, those of columns travel on with y. Backward: y goes round again, and its gradient with
it. No rank gathers the rows of all; a product serves both directions, as on one rank.

Collective calls: no graph of torch.compile holds them (there is a graph break), and all ranks
must run the backward, or none.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastxm.ops import info_nce_op, ring
from fastxm.ops import info_nce_reference as reference
from fastxm.ops.dispatch import no_autocast, wide
from fastxm.ops.distributed import gather_rows, row_counts
from fastxm.ops.info_nce_rows import factors, factors_of, finish_both, not_zero
from fastxm.ops.info_nce_sums import candidates, finish, join, terms
from fastxm.ops.vjp import vjp


class Options(NamedTuple):
    normalize: bool
    labels: Tensor | None  # [N], of this rank
    symmetric: bool
    smoothing: float
    budget: int  # bytes of products that may be kept
    counts: list[int]  # rows of each rank
    group: dist.ProcessGroup

    @property
    def start(self) -> int:
        """This rank's first row among those of all."""
        return sum(self.counts[: dist.get_rank(self.group)])

    def candidates(self) -> Tensor | int:
        """How many columns each row chooses from."""
        if not self.smoothing:
            return 1
        N, total = self.counts[dist.get_rank(self.group)], sum(self.counts)
        labels = None
        if self.labels is not None:
            labels = gather_rows(self.labels, self.counts, self.group)
        return candidates(labels, N, total, self.start)

    def turn(self, tensors, visit, join) -> ring.Chunk:
        own = [*tensors, *([] if self.labels is None else [self.labels])]
        return ring.turn(own, self.counts, self.group, visit, join)


@torch.compiler.disable
def across_ranks(x, y, scale, normalize, labels, symmetric, smoothing, group, budget):
    """Losses and statistics of this rank's rows among those of all, and how many a rank has."""
    counts = row_counts(len(x), x.device, group)
    labels = None if labels is None else labels.long()
    budget //= len(counts)
    options = Options(normalize, labels, symmetric, smoothing, budget, counts, group)
    # under autocast as everywhere: products are taken in the dtype of the rows
    with no_autocast(x):
        losses, *statistics = _Ranks.apply(x, y, scale, options)
    return losses, statistics, sum(counts) / len(counts)


def _sums(x, y, a, b, o: Options) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Sums of this rank's rows and their positives [6, N], of its columns [5, N], and products."""
    backend = info_nce_op.backend(x, y)
    rows, kept = torch.empty(0), []  # rows: until the first chunk, its own

    def visit(chunk, own):
        nonlocal rows
        y, b, *labels = chunk
        stored = info_nce_op.store(x, y, o.budget)
        # a positive is in the chunk that is one's own; else its column lies beyond
        where = (o.labels, *(labels or [None]), 0 if own else len(y))
        row, column, products = backend.sums(x, y, a, b, *where, stored)
        kept.append(products)
        rows = row if own else torch.cat([join(rows[:5], row[:5]), rows[5:]])
        return [column.T] if o.symmetric else []

    columns = o.turn((y, b), visit, lambda p, q: join(p.T, q.T).T)
    return rows, columns[0].T if o.symmetric else None, kept


def _gradients(row, column, x, y, a, b, kept, o: Options) -> tuple[Tensor, ...]:
    """g y and gᵀ x of this rank's rows, from its terms [3, N]."""
    backend, kept = info_nce_op.backend(x, y), iter(kept)
    dx = torch.zeros_like(wide(x)[0])

    def visit(chunk, own):
        y, b, column, *labels = chunk
        where = (o.labels, *(labels or [None]), 0 if own else len(y))
        column = column.T.contiguous() if o.symmetric else None
        given = (row, column, x, y, a, b, *where, o.smoothing, next(kept))
        more, dy = backend.gradients(*given)
        dx.add_(more)
        return [dy.to(dx.dtype)]

    (dy,) = o.turn((y, b, column.T), visit, torch.add)
    return dx, dy


def _formula(o: Options, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The losses from rows that are gathered: differentiable to any order, and not in O(N D)."""
    a, b = factors_of(x, y, scale, o.normalize)
    all_x, all_y, all_a, all_b = (gather_rows(t, o.counts, o.group) for t in (x, y, a, b))
    labels = None if o.labels is None else gather_rows(o.labels, o.counts, o.group)
    options = (labels, False, o.smoothing, o.start, False)
    losses = reference.fwd(x, all_y, a, all_b, *options)[0]
    if o.symmetric:
        losses = (losses + reference.fwd(y, all_x, b, all_a, *options)[0]) / 2
    return losses


class _Ranks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, y, scale, options: Options) -> tuple[Tensor, ...]:
        rnorms = info_nce_op.backend(x, y).rnorms(x, y) if options.normalize else None
        rows, columns, kept = _sums(x, y, *factors(x, y, scale, rnorms), options)
        count = options.candidates()
        losses, row_stats = finish(rows[:5], rows[5], options.smoothing, count)
        column_stats = rows.new_empty(3, 0)
        if columns is not None:
            other, column_stats = finish(columns, rows[5], options.smoothing, count)
            losses = (losses + other) / 2
        ctx.save_for_backward(x, y, scale, rnorms, row_stats, column_stats, *kept)
        ctx.options, ctx.count = options, count
        ctx.mark_non_differentiable(row_stats, column_stats)
        return losses, row_stats, column_stats

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, y, scale, rnorms, row_stats, column_stats, *kept = ctx.saved_tensors
        o, count = ctx.options, ctx.count
        if torch.is_grad_enabled():
            return (*vjp(partial(_formula, o), (x, y, scale), (dloss,)), None)
        weight = dloss / 2 if o.symmetric else dloss
        row = terms(row_stats[0], weight, o.smoothing, count)
        column = terms(column_stats[0], weight, o.smoothing, count) if o.symmetric else row[:0]
        scale = not_zero(scale)
        dx, dy = _gradients(row, column, x, y, *factors(x, y, scale, rnorms), kept, o)
        by = info_nce_op.backend(x, y).finish
        dx, dy, along = finish_both(by, x, y, dx, dy, rnorms)
        return dx, dy, along.sum() / scale, None
