"""Rows gathered from all ranks of a torch.distributed group, and gradients returned to theirs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def group_of(name: Any) -> dist.ProcessGroup:
    """The group of a `group_name`, as torch's functional collectives find it."""
    return _resolve_process_group(name)


def row_counts(rows: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """How many rows each rank holds; no GPU is waited for where the group talks on the CPU too."""
    here = device if "cpu" not in dist.get_backend_config(group) else "cpu"
    own = torch.tensor([rows], device=here)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return torch.cat(counts).tolist()


def gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, one below the other; differentiable to any order.

    Args:
        x: [counts[rank], ...], this rank's rows.
        counts: rows of each rank (`row_counts`); they may differ.
        group: the ranks.

    Returns:
        [sum(counts), ...]. Its gradient is summed over the ranks, and each gets its own rows.
    """
    return _Gather.apply(x, counts, group)


def all_rows(x: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """As `gather_rows`, of ranks that hold any number; x itself where there is no group."""
    if group is None:
        return x
    return gather_rows(x, row_counts(len(x), x.device, group), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        # ranks exchange equal shapes: the longest, of which each keeps its rows
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Scatter.apply(dy, ctx.counts, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        total = y.clone()
        dist.all_reduce(total, group=group)
        return total.split(list(counts))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(dx, ctx.counts, ctx.group), None, None
