"""Rows that go once round the ranks of a torch.distributed group, and come home with results.

No rank ever holds more than a few chunks: its own rows, those of the rank that it is at, and those
that are under way. The next chunk and the results of the last one travel while this one is
computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

Chunk = Sequence[Tensor]  # each [rows of a rank, ...]


def turn(
    own: Chunk,
    counts: Sequence[int],
    group: dist.ProcessGroup,
    visit: Callable[[Chunk, bool], Chunk],
    join: Callable[[Tensor, Tensor], Tensor],
) -> Chunk:
    """What all ranks find in this rank's chunk.

    Args:
        own: tensors [counts[rank], ...] of this rank.
        counts: rows of each rank; they may differ, and be 0.
        group: the ranks, each of which calls this.
        visit: is given the chunk of each rank, its own first, and whether it is its own; returns
            what it finds, tensors [rows of the chunk, ...].
        join: what two ranks found, made one; called in the order of the ranks.

    Returns:
        as many tensors [counts[rank], ...] as `visit` returns.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    chunk, found = own, own
    under_way: list[Any] = []
    for step in range(size):
        rows = counts[(rank - step - 1) % size]  # of the chunk that comes next
        last = step == size - 1
        coming, chunk_under_way = (chunk, []) if last else _pass_on(chunk, rows, group)
        mine = visit(chunk, step == 0)
        _wait(under_way)
        found = [join(p, q) for p, q in zip(found, mine)] if step else mine
        found, under_way = _pass_on(found, rows, group)
        _wait(chunk_under_way)
        chunk = coming
    _wait(under_way)
    return found


def _pass_on(tensors: Chunk, rows: int, group: dist.ProcessGroup) -> tuple[Chunk, list[Any]]:
    """The tensors, of some rows, of the rank before, and what to wait for until they are there.

    Its own go to the next rank. Tensors without elements stay where they are.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return tensors, []
    coming = [t.new_empty(rows, *t.shape[1:]) for t in tensors]
    sent = [(dist.isend, t.contiguous(), (rank + 1) % size) for t in tensors]
    received = [(dist.irecv, t, (rank - 1) % size) for t in coming]
    ops = [dist.P2POp(op, t, group=group, group_peer=peer)
           for op, t, peer in (*sent, *received) if t.numel()]  # fmt: skip
    return coming, dist.batch_isend_irecv(ops) if ops else []


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
