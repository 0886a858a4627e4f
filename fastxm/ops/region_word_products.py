"""The matrix products of region-word scores, of [P, K, R] blocks and regions [P, R, D]."""

import torch
from torch import Tensor

from fastxm.ops import gemm
from fastxm.ops.dispatch import wide_dtype

KEPT = 64 << 20  # bytes of s and the contexts (or h) that the forward keeps for the backward


class Vendor:
    """In the dtype of statistics, float32 or float64."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def with_regions(self, rows: Tensor, regions: Tensor, out: Tensor) -> None:
        """out [P, K, R] = rows [P, K, D] regionsᵀ."""
        torch.bmm(rows, regions.mT, out=out)

    def contexts(self, alpha: Tensor, regions: Tensor, out: Tensor) -> None:
        """out [P, K, D] = alpha [P, K, R] regions."""
        torch.bmm(alpha, regions, out=out)

    def to_regions(self, ds: Tensor, words: Tensor, h: Tensor, contexts: Tensor, out: Tensor):
        """out [P, R, D] = dsᵀ words + hᵀ contexts, of [P, K, R] and [P, K, D]."""
        torch.bmm(ds.mT, words, out=out)
        out.baddbmm_(h.mT, contexts)

    def to_words(self, ds: Tensor, regions: Tensor, out: Tensor) -> None:
        """out [K, D] += ds [K, R] regions [R, D]."""
        out.addmm_(ds, regions)


class Half:
    """In halves, with float32 accumulators and results; gradients of float16 in float32."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.back = torch.float32 if dtype == torch.float16 else dtype

    def with_regions(self, rows: Tensor, regions: Tensor, out: Tensor) -> None:
        gemm.multiply(rows.to(self.dtype), regions.mT, out)

    def contexts(self, alpha: Tensor, regions: Tensor, out: Tensor) -> None:
        gemm.multiply(alpha.to(self.dtype), regions, out)

    def to_regions(self, ds: Tensor, words: Tensor, h: Tensor, contexts: Tensor, out: Tensor):
        left, right = torch.cat([ds, h], 1), torch.cat([words, contexts.to(words.dtype)], 1)
        gemm.multiply(left.mT.to(self.back), right.to(self.back), out)

    def to_words(self, ds: Tensor, regions: Tensor, out: Tensor) -> None:
        gemm.accumulate(out, ds.to(self.back), regions.to(self.back))


class PackedHalf(Half):
    """In bfloat16 on a CPU, with float32 accumulators where a softmax follows."""

    def with_regions(self, rows: Tensor, regions: Tensor, out: Tensor) -> None:
        for a, y, s in zip(rows, regions, out):
            gemm.times(a.to(self.dtype), y, s)

    def contexts(self, alpha: Tensor, regions: Tensor, out: Tensor) -> None:
        out.copy_(torch.bmm(alpha.to(self.dtype), regions))

    def to_regions(self, ds: Tensor, words: Tensor, h: Tensor, contexts: Tensor, out: Tensor):
        P, K, R = ds.shape  # one product, so that the sum is rounded once
        left = words.new_empty(P, 2 * K, R)
        right = words.new_empty(P, 2 * K, words.shape[2])
        left[:, :K], left[:, K:], right[:, :K], right[:, K:] = ds, h, words, contexts
        out.copy_(torch.bmm(left.mT, right))

    def to_words(self, ds: Tensor, regions: Tensor, out: Tensor) -> None:
        out += ds.to(self.dtype) @ regions


def of(regions: Tensor, words: Tensor) -> Vendor | Half:
    """Halves where regions and words are of one kind: on a GPU; or, if bfloat16, where a CPU has a
    tile kernel, and D makes it pay."""
    dtype, device = regions.dtype, regions.device.type
    if device == "cuda" and dtype == words.dtype and dtype in gemm.HALVES:
        return Half(dtype)
    half = dtype == words.dtype == torch.bfloat16 and device == "cpu"
    if half and torch.bfloat16 in gemm.PACKED and regions.shape[-1] in range(64, 1 << 20, 2):
        return PackedHalf(dtype)
    return Vendor(wide_dtype(regions, words))


def gram(regions: Tensor, words: Tensor) -> bool:
    """Whether |c|^2 comes from r rᵀ: cheaper with many words; but of few regions c may be
    much shorter than they are, and alpha (r rᵀ) would lose its digits."""
    (R, D), K = regions.shape[1:], words.shape[0] * words.shape[1]
    wide = not isinstance(of(regions, words), Half)
    return wide and R > 32 and R * (D + K) < K * D


def kept_places(kept: Tensor, regions: Tensor, K: int) -> tuple[Tensor, Tensor] | None:
    """Where s [P, K, R] and the contexts (or h) [P, K, ..] of all pictures are, if kept."""
    (P, R, _), width = regions.shape, kept.shape[2]
    if width <= 1:
        return None
    sizes = [P * K * R, P * K * (width - R)]
    s, product = kept.view(-1)[: sum(sizes)].split(sizes)
    return s.view(P, K, R), product.view(P, K, width - R)


def kept_shape(regions: Tensor, words: Tensor, keep: bool) -> tuple[int, ...]:
    """The shape of what every forward keeps: on a CPU all of s and the contexts (or h), or nothing;
    on a GPU |c|^2."""
    (P, R, D), K = regions.shape, words.shape[0] * words.shape[1]
    if keep and regions.is_cuda:
        return (P, K, 1)
    width = R + (R if gram(regions, words) else D)
    few = P * K * width * wide_dtype(regions, words).itemsize <= KEPT
    return (P, K, width) if keep and few and regions.device.type == "cpu" else (0, 0, 0)
