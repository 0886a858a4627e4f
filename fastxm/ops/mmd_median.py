"""The median heuristic: the middle of all distances, of which a block is held at a time.

The distances of a block are counted by sixteen of their bits, from the highest on; the next pass
counts those alone that begin as the median does. Two passes find it exactly, four in float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops.dispatch import no_autocast
from fastxm.ops.mmd_backends import tf32
from fastxm.ops.mmd_checks import problem
from fastxm.ops.mmd_kernels import RBF
from fastxm.ops.mmd_pairs import distances
from fastxm.ops.mmd_rows import centred

DIGIT = 16  # bits
BLOCK = 1 << 20  # pairs of rows at a time


def median_heuristic(x: Tensor, y: Tensor) -> Tensor:
    """Median distance between two of the N + M rows, a common RBF bandwidth.

    Args:
        x, y: [N, D] and [M, D], any floating dtype. Memory is O((N + M) D), but every pass takes
            (N + M)^2 D operations: a subsample of a few thousand rows does as well.

    Returns:
        a scalar without gradient, the mean of the two middle values of an even number, float32
        (float64 for float64 inputs). RBF(median) is exp(-d^2 / (2 median^2)).
    """
    problem(x, y, RBF(), one=True)
    with torch.no_grad(), no_autocast(x):
        return _median(torch.cat(centred(*dispatch.wide(x, y))))


@torch.library.custom_op("fastxm::mmd_median", mutates_args=())
def _median(z: Tensor) -> Tensor:
    """The median distance between two rows of z; an op, for the counts decide what comes next."""
    pairs = len(z) * (len(z) - 1) // 2
    with tf32(z.device, False):
        return _of_ranks(z, [(pairs - 1) // 2, pairs // 2]).sqrt().mean()


@_median.register_fake
def _(z):
    return z.new_empty(())


def _of_ranks(z: Tensor, ranks: list[int]) -> Tensor:
    """The squared distances of these ranks, from 0, among those of all pairs of rows of z."""
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[z.dtype]
    top = 8 * integer.itemsize - DIGIT
    found = [0] * len(ranks)  # the digits so far
    for shift in range(top, -1, -DIGIT):
        counts = {begin: z.new_zeros(1 << DIGIT, dtype=torch.long) for begin in found}
        for d2 in _blocks(z):
            digits = d2.view(integer) >> shift
            for begin, count in counts.items():
                own = digits if shift == top else digits[digits >> DIGIT == begin]
                count += (own & ((1 << DIGIT) - 1)).bincount(minlength=1 << DIGIT)
        for k, begin in enumerate(found):
            below = counts[begin].cumsum(0)
            digit = int((below <= ranks[k]).sum())
            ranks[k] -= int(below[digit - 1]) if digit else 0
            found[k] = begin << DIGIT | digit
    return torch.tensor(found, dtype=integer, device=z.device).view(z.dtype)


def _blocks(z: Tensor) -> Iterator[Tensor]:
    """Squared distances of each two rows of z, once, some rows at a time."""
    n = max(1, BLOCK // len(z))
    for i in range(0, len(z), n):
        d2 = distances(z[i : i + n], z[i:]).abs()  # the sign of 0, or of NaN, would count as a bit
        square = d2[:, : len(d2)]
        yield square[torch.ones_like(square, dtype=torch.bool).triu(1)]
        yield d2[:, len(d2) :].flatten()
