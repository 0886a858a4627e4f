"""Joins the sums of parts that kernels/info_nce.py writes, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

NOTHING = tl.constexpr(-1e30)
BLOCK = 32  # rows, or columns, of a program: as many as make 128 bytes


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(partial, sums, n, parts, stride, SUMS: tl.constexpr, GROUPS: tl.constexpr,
                  PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    old = tl.load(sums + j, j < n, other=NOTHING)
    reference = old
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        here = (part < parts)[:, None] & (j < n)[None, :]
        at = partial + tl.cast(part, tl.int64)[:, None] * n + j[None, :]
        reference = tl.maximum(reference, tl.max(tl.load(at, here, other=NOTHING), 0))
    less = tl.exp(old - reference)
    exps = tl.load(sums + stride + j, j < n, other=0.0) * less
    if SUMS > 2:
        dots = tl.load(sums + 2 * stride + j, j < n, other=0.0) * less
    if SUMS > 3:
        plain = tl.load(sums + 3 * stride + j, j < n, other=0.0)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        here = (part < parts)[:, None] & (j < n)[None, :]
        wide = tl.cast(part, tl.int64)
        high = tl.load(partial + wide[:, None] * n + j[None, :], here, other=NOTHING)
        share = tl.exp(high - reference[None, :])
        each = here[:, None, :]
        of_group = wide[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
        at_sums = partial + (parts + of_group)[:, :, None] * n + j[None, None, :]
        plane = tl.cast(parts, tl.int64) * GROUPS * n
        exps += tl.sum(tl.sum(tl.load(at_sums, each, other=0.0), 1) * share, 0)
        if SUMS > 2:
            dots += tl.sum(tl.sum(tl.load(at_sums + plane, each, other=0.0), 1) * share, 0)
        if SUMS > 3:
            plain += tl.sum(tl.sum(tl.load(at_sums + 2 * plane, each, other=0.0), 1), 0)
    tl.store(sums + j, reference, j < n)
    tl.store(sums + stride + j, exps, j < n)
    if SUMS > 2:
        tl.store(sums + 2 * stride + j, dots, j < n)
        tl.store(sums + 4 * stride + j, reference, j < n)
    if SUMS > 3:
        tl.store(sums + 3 * stride + j, plain, j < n)


def merge(partial: Tensor, parts: int, groups: int, sums: Tensor, count: int) -> None:
    """Joins to sums [5, n] (see info_nce_sums) those of parts.

    partial: [parts + (count - 1) parts groups or more, n], a reference of each part, and its sums
    of e, of e s and of s, as far as `count` goes, over each of its groups.
    """
    n = sums.shape[1]
    _merge_kernel[(triton.cdiv(n, BLOCK),)](
        partial, sums, n, parts, sums.stride(0), count, groups, max(1, 32 // groups), BLOCK
    )


COMPILES = [
    (
        _merge_kernel,
        {"partial": "*fp32:16", "sums": "*fp32:16", "n": "i32:16", "parts": "i32",
         "stride": "i32:16"},
        {"SUMS": count, "GROUPS": groups, "PARTS": 32 // groups, "BLOCK": BLOCK},
        {"num_warps": 4},
    )
    for count in (2, 3, 4)
    for groups in (1, 4, 8)
]  # fmt: skip
