"""Groups of ranks, in an order of their own where this torch allows one."""

import inspect

import torch.distributed as dist

ORDERED = "sort_ranks" in inspect.signature(dist.new_group).parameters  # else it sorts them


def order(*ranks: int) -> tuple[int, ...]:
    """The ranks of a group, in the group's order."""
    return ranks if ORDERED else tuple(sorted(ranks))


def new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    return dist.new_group(ranks, **({"sort_ranks": False} if ORDERED else {}))
