"""Batch statistics across the ranks of a torch.distributed group, each of which has its own rows.

Two exchanges of a few numbers a channel: moments in the forward, sums of gradients in the backward.
A group goes by its name here, which an op's schema can hold: a compiled graph stays whole.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastxm.ops.distributed import gather_rows, group_of


def pool(x: Tensor, mean: Tensor, var: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the values of all ranks; differentiable to any order.

    Args:
        x: what this rank has.
        mean, var: of it, in any shape.
        name: of the group; "" is this process alone.
    """
    if not name:
        return mean, var
    group, n = group_of(name), x.numel() // mean.numel()
    own = torch.stack([mean, var, torch.full_like(mean, n)])[None]
    means, variances, counts = gather_rows(own, [1] * dist.get_world_size(group), group).unbind(1)
    share = counts / counts.sum(0)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def means(x: Tensor, sums: Sequence[Tensor], name: str) -> list[Tensor]:
    """Means over the values of all ranks.

    Args:
        x: what this rank has.
        sums: over its values, all of one shape.
        name: of the group; "" is this process alone.
    """
    n = x.numel() // max(1, sums[0].numel())
    if not name:
        return [each / n for each in sums]
    whole = torch.stack([*sums, torch.full_like(sums[0], n)])
    dist.all_reduce(whole, group=group_of(name))
    *sums, count = whole.unbind()
    return [each / count for each in sums]
