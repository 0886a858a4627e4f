"""The matrix products of region-word scores, of [P, K, R] blocks and regions [P, R, D]."""

import torch
from torch import Tensor

from fastxm.ops import gemm
from fastxm.ops.dispatch import wide_dtype

KEPT = 128 << 20  # bytes of s and the contexts (or h) that the forward keeps for the backward


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


def of(regions: Tensor, words: Tensor) -> Vendor | Half:
    """Halves on a GPU, where regions and words are of one kind."""
    dtype = regions.dtype
    if regions.is_cuda and dtype == words.dtype and dtype in gemm.HALVES:
        return Half(dtype)
    return Vendor(wide_dtype(regions, words))


def tile_dtype(regions: Tensor, words: Tensor) -> torch.dtype | None:
    """Of the tile kernels' products: bfloat16 where regions and words are; None where there are
    none, or on short rows, where others are at least as fast."""
    D, wide = regions.shape[2], wide_dtype(regions, words)
    if D < gemm.PANEL or regions.device.type != "cpu" or wide != torch.float32:
        return None
    half = regions.dtype == words.dtype == torch.bfloat16 and D % 2 == 0
    if half and torch.bfloat16 in gemm.PACKED:
        return torch.bfloat16
    return torch.float32 if torch.float32 in gemm.PACKED else None


def dtype_of(regions: Tensor, words: Tensor) -> torch.dtype:
    """What regions and words are rounded to for the products."""
    return tile_dtype(regions, words) or of(regions, words).dtype


def gram(regions: Tensor, words: Tensor) -> bool:
    """Whether |c|^2 comes from r rᵀ: cheaper with short rows of r rᵀ and many words; but of few
    regions c may be much shorter than they are, and alpha (r rᵀ) would lose its digits, as in
    halves it does of many."""
    (R, D), K = regions.shape[1:], words.shape[0] * words.shape[1]
    wide = dtype_of(regions, words) not in gemm.HALVES
    return wide and 32 < R <= D and 2 * R * (D + K) < 3 * K * D


def kept_places(kept: Tensor, regions: Tensor, K: int) -> tuple[Tensor, Tensor] | None:
    """Where s [P, K, R] and the contexts (or h) [P, K, ..] are, of as many pictures as fit."""
    R, width = regions.shape[1], kept.shape[2]
    P = min(len(regions), kept.numel() // max(1, K * width)) if width > 1 else 0
    if P == 0:
        return None
    s, product = kept.view(-1)[: P * K * width].split([P * K * R, P * K * (width - R)])
    return s.view(P, K, R), product.view(P, K, width - R)


def found_places(kept: Tensor, regions: Tensor, K: int) -> tuple[Tensor, Tensor] | None:
    """kept_places, if the forward wrote them: NaN is the mark of a backend that keeps nothing, and
    one of the inputs' comes again."""
    places = kept_places(kept, regions, K)
    return None if places is None or bool(places[0][0, :, 0].isnan().any()) else places


def kept_shape(regions: Tensor, words: Tensor, keep: bool) -> tuple[int, ...]:
    """The shape of what every forward keeps: on a CPU s and the contexts (or h), by tiles of as
    many pictures as fit into KEPT, else of all or none; on a GPU |c|^2."""
    (P, R, D), K = regions.shape, words.shape[0] * words.shape[1]
    if keep and regions.is_cuda:
        return (P, K, 1)
    if not keep or regions.device.type != "cpu":
        return (0, 0, 0)
    tile, wide = tile_dtype(regions, words), wide_dtype(regions, words).itemsize
    short = D if tile is None else D * tile.itemsize // wide
    width = R + (R if gram(regions, words) else short)
    fitting = KEPT // max(1, K * width * wide)
    return (0, 0, 0) if tile is None and fitting < P else (min(P, fitting), K, width)
