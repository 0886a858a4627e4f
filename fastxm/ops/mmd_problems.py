"""Many MMDs in one call: the rows of all problems one below the other, and where each begins."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch
from fastxm.ops.mmd_rows import Function


def ranges(starts: Tensor | None, count: int) -> list[slice]:
    """The rows of each problem."""
    ends = [0, count] if starts is None else starts.tolist()
    return [slice(i, j) for i, j in pairwise(ends)]


def per_problem(rows: Tensor, starts: Tensor | None) -> Tensor:
    """Sums [G, ...] over the rows [N, ...] of each problem; differentiable to any order."""
    if starts is None:
        return rows.sum(0, keepdim=True)
    return torch.stack([rows[place].sum(0) for place in ranges(starts, len(rows))])


def _segments(rows: Tensor, starts: Tensor) -> Tensor:
    """As per_problem, at once, without derivatives."""
    return torch.segment_reduce(rows, "sum", lengths=starts.diff(), axis=0, initial=0)


def per_row(values: Tensor, starts: Tensor | None, rows: int) -> Tensor:
    """What each problem has, values [G, ...], for each of all rows; of one problem [...]."""
    if starts is None:
        return values[0]
    counts = starts.diff().to(values.device)
    return torch.repeat_interleave(values, counts, dim=0, output_size=rows)  # else it waits


def many(
    function: Function,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    x_starts: Tensor,
    y_starts: Tensor,
    drop: tuple[bool, bool],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Small problems on a CPU, each by one thread; arguments and results as of mmd_sums._fwd."""
    starts = [s.long().contiguous() for s in (x_starts, y_starts)]
    x, y = x.to(a), y.to(b)
    if function.radial:
        counts = (starts[0] + starts[1]).diff()[:, None]
        centre = (_segments(x, starts[0]) + _segments(y, starts[1])) / counts
        x, y = (z - per_row(centre, s, len(z)) for z, s in zip((x, y), starts))
    x, y = x.contiguous(), y.contiguous()
    norms = [z.square().sum(1) for z in (x, y)]
    of_x, of_y = (per_row(c, s, len(z)) for z, s in zip((x, y), starts))
    # of the pairs in x, in y, and of both
    scales = [(f * w).to(a.dtype) for f, w in
              ((2 * of_x[:, 0], a), (2 * of_y[:, 1], b), (of_x[:, 2], a))]  # fmt: skip
    p, r, q, t = (torch.zeros_like(w, dtype=torch.float64) for w in (a, b, a, b))
    slopes = [torch.zeros_like(w) for w in (a, b)]
    gradients = [torch.zeros_like(z) if w else None for z, w in zip((x, y), wanted)]
    derivatives = c.new_zeros(len(c), len(function.parameters))
    tensors = [*starts, x, y, *norms, a, b, *scales, p, r, q, t, *slopes, *gradients,
               derivatives if wanted[2] else None]  # fmt: skip
    numbers = [len(c), x.shape[1], *drop]
    numbers += [0 if u is None else u.data_ptr() for u in tensors]
    _C.mmd_problems_cpu(function.numbers(function.parameters), numbers, dispatch.threads())
    sums = torch.stack([_segments(u.double() * v.double(), s) for u, v, s in
                        ((a, p, starts[0]), (b, r, starts[1]), (a, q, starts[0]))], 1)  # fmt: skip
    if function.radial:
        for dz, slope, z in zip(gradients, slopes, (x, y)):
            if dz is not None:
                dz.addcmul_(slope[:, None], z, value=-1)
    dx, dy = (a.new_empty(0) if dz is None else dz for dz in gradients)
    da, db = 2 * of_x[:, 0] * p + of_x[:, 2] * q, 2 * of_y[:, 1] * r + of_y[:, 2] * t
    return (c * sums).sum(1).to(a.dtype), dx, dy, da.to(a), db.to(b), sums, derivatives
