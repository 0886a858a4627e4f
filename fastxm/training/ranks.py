"""The processes of one training, as `torchrun` and `accelerate launch` start them.

Each draws what one process alone would, the order of the data, noise and augmentation of the whole
batch, and computes its own rows of it. Losses are such that their average over ranks is that of the
whole batch, and so are gradients averaged: numbers depend on how many ranks there are by rounding
alone, and a checkpoint may be resumed on any number of them.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastxm.ops.distributed import gather_rows, row_counts

BUCKET = 1 << 24  # numbers that are exchanged at once
PATIENCE = timedelta(hours=1)  # while the first rank draws, judges and writes, others wait


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training; of one alone, the default, nothing is exchanged.

    Args:
        rank: of this process; the first, 0, alone writes.
        size: how many there are.
        group: of torch.distributed; None of one process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """This rank's rows of a whole batch: consecutive shares, equal but for one row."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def own(self, whole: Tensor, parts: int = 1) -> Tensor:
        """This rank's rows of each of some equal parts of a whole batch [parts * B, ...]."""
        if self.size == 1:
            return whole
        split = whole.unflatten(0, (parts, -1))
        return split[:, self.rows(split.shape[1])].flatten(0, 1)

    def whole(self, own: Tensor, total: int) -> Tensor:
        """The rows of all ranks [total, ...], of which these are this one's."""
        if self.size == 1:
            return own
        ends = [total * rank // self.size for rank in range(self.size + 1)]
        return gather_rows(own, [b - a for a, b in pairwise(ends)], self.group)

    def share(self, total: int) -> float:
        """What a mean over this rank's rows of a whole batch is multiplied by.

        The average of such products over ranks is the mean over the whole batch.
        """
        own = self.rows(total)
        return self.size * (own.stop - own.start) / total

    def check(self, rows: int, name: str = "batch_size") -> None:
        """Raises ValueError where a batch has fewer rows than there are ranks."""
        if self.size > rows:
            raise ValueError(f"{name} {rows} leaves some of {self.size} processes no row")

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors, averaged over ranks, in their memory order."""
        if self.size == 1:
            return tensors
        averaged: list[Tensor] = []
        for _, bucket, views in buckets(tensors):
            dist.all_reduce(bucket, group=self.group)
            bucket.div_(self.size)
            averaged += views
        return averaged

    @torch.no_grad()
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Makes the tensors those of the first rank, in place."""
        if self.size > 1:
            for some, bucket, views in buckets(sorted(tensors, key=lambda t: str(kind(t)))):
                dist.broadcast(bucket, group_src=0, group=self.group)
                torch._foreach_copy_(some, views)

    def of_first(self, state: Any) -> Any:
        """What the first rank has for these tensors and plain values."""
        if self.size == 1:
            return state
        file = io.BytesIO()
        torch.save(state, file)
        data = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        length = torch.tensor(len(data))
        dist.broadcast(length, group_src=0, group=self.group)
        data = data if self.first else data.new_empty(int(length))
        dist.broadcast(data, group_src=0, group=self.group)
        return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; none goes on before all have come here."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))  # on the CPU: no GPU is waited for
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return bool(found)


class Shares:
    """Batches that are shared out in equal parts, each by itself: rank r's rows hold those of parts
    0, 1, ... in turn, so that groups of a row of each part, and the first half, are shared out too.

    Of one process a batch is one part, and `own` is all of it.

    Args:
        ranks: of this process.
        batch_size: rows of the whole batch.
        group: parts of it, an even number.

    Raises:
        ValueError: there are several ranks, and they cannot have a group each.
    """

    def __init__(self, ranks: Ranks, batch_size: int, group: int):
        self.ranks, self.parts, self.groups = ranks, 1, batch_size
        if ranks.size > 1:
            if batch_size % group or batch_size < group * ranks.size:
                raise ValueError(
                    f"{ranks.size} processes share out whole groups of {group} rows: batch_size is "
                    f"a multiple of {group}, at least {group * ranks.size}, not {batch_size}"
                )
            self.parts, self.groups = group, batch_size // group
        rows = ranks.rows(self.groups)
        self.here = rows.stop - rows.start  # groups of this rank

    @property
    def share(self) -> float:
        """What a mean over this rank's rows is multiplied by, as `Ranks.share`."""
        return self.ranks.share(self.groups)

    def whole(self, count: int) -> int:
        """How many rows all ranks have where this one has `count`, of a batch or of its half."""
        return count if self.ranks.size == 1 else count // self.here * self.groups

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of those of all, of a batch or of its first half."""
        return self.ranks.own(whole, len(whole) // self.groups)

    def randn(self, count: int, *shape: int, **options: Any) -> Tensor:
        """This rank's `count` rows [count, ...] of noise that is drawn for all."""
        return self.own(torch.randn(self.whole(count), *shape, **options))

    def rand(self, count: int, *shape: int, **options: Any) -> Tensor:
        """The same of numbers in [0, 1)."""
        return self.own(torch.rand(self.whole(count), *shape, **options))

    def randn_like(self, rows: Tensor) -> Tensor:
        """Noise in the memory order of rows, which decides what is drawn where."""
        size = self.whole(len(rows)), *rows.shape[1:]
        return self.own(torch.randn_like(rows.new_empty_strided(size, rows.stride())))

    def grain(self, x: Tensor) -> Tensor:
        """Noise [B, 1, H, W] of this rank's rows, for x [B, C, H, W]."""
        return self.randn(len(x), 1, *x.shape[2:], dtype=x.dtype, device=x.device)


class WholeDropout(TorchFunctionMode):
    """Inside, dropout of a rank's rows draws for those of all ranks, as one process does.

    Args:
        ranks: of this process; all of them drop out, each of as many rows as it has.
    """

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.dropout or self.ranks.size == 1:
            return func(*args, **(kwargs or {}))
        return self.dropout(*args, **(kwargs or {}))

    def dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return x
        counts = row_counts(len(x), x.device, self.ranks.group)
        kept = F.dropout(x.new_ones(sum(counts), *x.shape[1:]), p)
        return x * kept.split(counts)[self.ranks.rank]


def kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def buckets(tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], Tensor, list[Tensor]]]:
    """Consecutive tensors of a kind, a flat copy of them, and each as it stands in the copy."""
    some: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in some) + tensor.numel() > BUCKET
        if some and (full or kind(some[0]) != kind(tensor)):
            yield some, *flattened(some)
            some = []
        some.append(tensor)
    if some:
        yield some, *flattened(some)


def flattened(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    flat = tensors[0].new_empty(sum(t.numel() for t in tensors))
    parts = flat.split([t.numel() for t in tensors])
    strides = [torch.empty_like(t, device="meta").stride() for t in tensors]  # dense
    views = [part.as_strided(t.shape, s) for part, t, s in zip(parts, tensors, strides)]
    torch._foreach_copy_(views, tensors)
    return flat, views


def launched() -> int:
    """How many processes there are: of torch.distributed, else as torchrun or accelerate say."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE") or 1)


def alone(system: str) -> None:
    """Raises ValueError where several processes would train a system that one alone can."""
    if launched() > 1:
        raise ValueError(f"{system} trains in one process: start it without torchrun")


def number(name: str = "RANK") -> int:
    """This process's number among them all, or with "LOCAL_RANK" among those of its machine."""
    return int(os.environ.get(name) or 0) if launched() > 1 else 0


@contextlib.contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """The processes that were launched, in touch until the training ends.

    Args:
        device: what this one computes on.
    """
    if launched() == 1:
        yield Ranks()
        return
    backend = "gloo"  # what the loop asks goes through the CPU
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    before = dist.is_initialized()
    if before:
        group = dist.new_group(backend=backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, timeout=PATIENCE)
        group = dist.group.WORLD
    yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    # not after an error: others may wait in an exchange that will not come, and end with torchrun
    dist.destroy_process_group(group if before else None)
