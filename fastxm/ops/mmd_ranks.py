"""MMD across the ranks of a torch.distributed group, each of which keeps its own rows.

The rows of x and y go round: every rank takes the pairs of its rows with those that it meets, and
what the travelling rows get of them travels home with them. Of two ranks only one takes the pairs
within x and within y; no rank gathers the rows of all.

Collective calls: torch.compile breaks its graph, and all ranks must run the backward, or none.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastxm.ops import mmd_backends, mmd_reference, ring
from fastxm.ops.dispatch import no_autocast
from fastxm.ops.distributed import gather_rows, row_counts
from fastxm.ops.mmd_reference import Options, unpack
from fastxm.ops.mmd_rows import Function, Rows, finish, samples
from fastxm.ops.mmd_tiles import visit
from fastxm.ops.vjp import vjp


class Ranks(NamedTuple):
    x_counts: list[int]  # rows of each rank
    y_counts: list[int]
    group: dist.ProcessGroup

    @classmethod
    def of(cls, x: Tensor, y: Tensor, group: dist.ProcessGroup) -> "Ranks":
        x_counts, y_counts = (row_counts(len(z), z.device, group) for z in (x, y))
        return cls(x_counts, y_counts, group)

    def total(self, own: Tensor) -> Tensor:
        """The sum over all ranks, differentiable."""
        return gather_rows(own[None], [1] * len(self.x_counts), self.group).sum(0)


@torch.compiler.disable
def kernel_sums(x, y, a, b, c, parameters, options: Options, ranks: Ranks) -> Tensor:
    """As mmd_sums.kernel_sums for the one problem of the rows of all ranks; [1]."""
    with no_autocast(x):
        return _Sums.apply(x, y, a, b, c, parameters, options, ranks)


@torch.compiler.disable
def linear_sums(x, y, a, b, c, drop_self: bool, drop_paired: bool, ranks: Ranks) -> Tensor:
    """As mmd_reference.linear_sums for the rows of all ranks; [1]."""
    u, v = a.double()[:, None] * x, b.double()[:, None] * y  # as in mmd_reference.linear_sums
    p, q = ranks.total(u.sum(0)), ranks.total(v.sum(0))
    sums = [p.square().sum(), q.square().sum(), (p * q).sum()]
    if drop_self:
        sums[0] = sums[0] - ranks.total(u.square().sum())
        sums[1] = sums[1] - ranks.total(v.square().sum())
    if drop_paired:
        sums[2] = sums[2] - ranks.total((u * v).sum())
    return (c * torch.stack(sums)).sum(1).to(a.dtype)


class _Visits:
    """The pairs that this rank takes, and what its rows and those that it meets get of them."""

    def __init__(self, x, y, a, b, c, parameters, o: Options, r: Ranks, wanted: list[bool]):
        self.o, self.r, self.wanted, self.terms = o, r, wanted, unpack(o.terms)
        self.rank, self.size, self.step = dist.get_rank(r.group), len(r.x_counts), 0
        name = mmd_backends.backend(a, wanted[2])
        self.how, self.packed = (mmd_backends.MAKERS[name], mmd_backends.TILE[name]), name == "cpu"
        self.coefficients = (2 * c[0, 0], 2 * c[0, 1], c[0, 2])
        self.totals, self.derivatives = c.new_zeros(3), c.new_zeros(len(parameters))
        derivatives = self.derivatives if wanted[2] else None
        self.function = Function(self.terms, parameters, derivatives, o.precision)
        radial, sums = self.terms[0].radial, x.double().sum(0) + y.double().sum(0)
        centre = r.total(sums) / (sum(r.x_counts) + sum(r.y_counts))
        of_x, of_y = samples(x, y, a, b, radial, False, centre.to(a) if radial else None)
        self.z, self.weight = torch.cat([of_x[0], of_y[0]]), torch.cat([a, b])
        self.own = self.rows(self.z, self.weight, len(x))
        self.gains = [torch.zeros_like(a), torch.zeros_like(b)]  # of the weights

    def rows(self, z: Tensor, weight: Tensor, n: int) -> list[Rows]:
        parts = zip((z[:n], z[n:]), (weight[:n], weight[n:]), self.wanted)
        return [Rows.make(u, u, w, want, self.packed) for u, w, want in parts]

    def pairs(self, rows: Rows, columns: Rows, k: int, drop: bool, times: int = 1) -> Any:
        """What the weights of rows and of columns get; k: 0 within x, 1 within y, 2 of both."""
        p, q = visit(self.function, rows, columns, self.coefficients[k], drop, *self.how)
        self.totals[k] += times * (rows.weight.double() * p.double()).sum()
        return self.coefficients[k] * p, self.coefficients[k] * q

    def meet(self, chunk: ring.Chunk, at_home: bool) -> ring.Chunk:
        z, weight = chunk
        n = self.r.x_counts[(self.rank - self.step) % self.size]
        met = self.own if at_home else self.rows(z, weight, n)
        gains = self.gains if at_home else [torch.zeros_like(row.weight) for row in met]
        # after half a round each two ranks have met; halfway round, both at once
        half = 2 * self.step
        takes = half < self.size or (half == self.size and self.rank < self.size // 2)
        for k in (0, 1) if takes else ():
            drop = at_home and self.o.drop_self
            p, q = self.pairs(self.own[k], met[k], k, drop, 1 if at_home else 2)
            self.gains[k] += p
            gains[k] += 0 if at_home else q
        p, q = self.pairs(self.own[0], met[1], 2, at_home and self.o.drop_paired)
        self.gains[0] += p
        gains[1] += q
        self.step += 1
        if at_home:  # what these rows get is not done with before the last step
            return [torch.zeros_like(z), torch.zeros_like(weight)]
        return [self.gradients(met, z), torch.cat(gains)]

    def gradients(self, both: list[Rows], z: Tensor) -> Tensor:
        parts = zip(both, z.split([len(rows.z) for rows in both]))
        found = [torch.zeros_like(u) if rows.gradient is None
                 else finish(rows, u, self.terms[0].radial) for rows, u in parts]  # fmt: skip
        return torch.cat(found)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, y, a, b, c, parameters, options: Options, ranks: Ranks) -> Tensor:
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
        visits = _Visits(x, y, a, b, c, parameters, options, ranks, wanted)
        counts = [n + m for n, m in zip(ranks.x_counts, ranks.y_counts)]
        dz, dw = ring.turn((visits.z, visits.weight), counts, ranks.group, visits.meet, torch.add)
        dz = dz + visits.gradients(visits.own, visits.z)
        dw = dw + torch.cat(visits.gains)
        sums = ranks.total(visits.totals)
        gradients = (*dz.split([len(x), len(y)]), *dw.split([len(x), len(y)]), sums[None],
                     ranks.total(visits.derivatives))  # fmt: skip
        ctx.save_for_backward(x, y, a, b, c, parameters, *gradients)
        ctx.options, ctx.ranks = options, ranks
        return (c[0] * sums).sum()[None].to(a.dtype)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = (saved := ctx.saved_tensors)[:6], saved[6:]
        r, o = ctx.ranks, ctx.options
        if torch.is_grad_enabled():

            def formula(x, y, a, b, c, parameters):
                rows = zip((x, y, a, b), (r.x_counts, r.y_counts) * 2)
                x, y, a, b = (gather_rows(t, counts, r.group) for t, counts in rows)
                return mmd_reference.kernel_sums((None, None), o, x, y, a, b, c, parameters)

            return (*vjp(formula, inputs, [dtotal]), None, None)
        # rows have a share in the result of every rank; c and the parameters are a rank's own
        factors = (*(r.total(dtotal),) * 4, dtotal, dtotal)
        found = [(f * g).to(t.dtype) if need else None for f, g, t, need in
                 zip(factors, gradients, inputs, ctx.needs_input_grad)]  # fmt: skip
        return (*found, None, None)
