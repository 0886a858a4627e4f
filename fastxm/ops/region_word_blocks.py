"""Region-word scores some pictures at a time: vendor GEMM and the C++ epilogues of fastxm._C.

What is kept of a picture are [K, R] blocks over the K words of all texts. With the rows r of a
picture, s = w rᵀ, alpha = softmax(s) and the contexts c = alpha r:

    <w, c> = sum_r alpha s        |c|^2 = sum_r alpha h,    h = c rᵀ = alpha (r rᵀ)
"""

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops.dispatch import threads, wide_dtype
from fastxm.ops.region_word_reference import EPS, valid_words

BLOCK = 8 << 20  # bytes that s, alpha and h may take together: they are to stay in the cache
KEPT = 64 << 20  # bytes of s and the contexts (or h) that the forward keeps for the backward


def gram(regions: Tensor, words: Tensor) -> bool:
    """Whether |c|^2 comes from r rᵀ: cheaper with many words; but of few regions c may be
    much shorter than they are, and alpha (r rᵀ) would lose its digits."""
    (R, D), K = regions.shape[1:], words.shape[0] * words.shape[1]
    return R > 32 and R * (D + K) < K * D


def kept_shape(regions: Tensor, words: Tensor) -> tuple[int, ...]:
    """The shape of what the forward keeps: all of s and the contexts (or h), or nothing."""
    (P, R, D), K = regions.shape, words.shape[0] * words.shape[1]
    width = R + (R if gram(regions, words) else D)
    few = regions.device.type == "cpu" and P * K * width * 4 <= KEPT
    return (P, K, width) if few else (0, 0, 0)


class _Words:
    """The words of all texts, packed, and the options."""

    def __init__(self, regions, words, lengths, sharp, pool, word_softmax):
        self.gram = gram(regions, words)
        self.valid, self.texts = valid_words(words, lengths), len(words)
        self.packed = words[self.valid]  # [K, D]
        self.starts = torch.nn.functional.pad(self.valid.sum(1).cumsum(0), (1, 0))
        self.rnorm = self.packed.square().sum(1).clamp_min(EPS).rsqrt()
        self.sharp, self.pool, self.word_softmax = sharp, pool, word_softmax
        self.float64 = words.dtype == torch.float64

    def blocks(self, regions: Tensor) -> list[slice]:
        """The pictures in groups whose blocks fit the cache."""
        each = 3 * len(self.packed) * regions.shape[1] * self.packed.element_size()
        n = max(1, BLOCK // max(1, each))
        return [slice(i, min(i + n, len(regions))) for i in range(0, len(regions), n)]


class _Block:
    """Regions [P, R, D] of some pictures, of any dtype, and what the words make of them."""

    def __init__(self, words: _Words, regions: Tensor):
        (P, R, D), K = regions.shape, len(words.packed)
        new = words.packed.new_empty
        self.words, self.every_words = words, words.packed.expand(P, K, D)
        self.picture = new(P, R, D).copy_(regions)
        if not words.word_softmax:
            self.norm = torch.linalg.vector_norm(self.picture, dim=2, keepdim=True)
            self.picture.div_(self.norm.clamp_min_(EPS**0.5))
        self.s, self.alpha, self.h = new(P, K, R), new(P, K, R), new(P, K, R)
        self.dots, self.square, self.radial = new(P, K), new(P, K), new(P, K)
        self.inner = new(P, R, R) if words.gram else new(P, K, D)  # r rᵀ, or the contexts
        self.product = self.h if words.gram else self.inner
        self.sizes = (words.starts.data_ptr(), words.texts, P)

    def forward(self, scores: Tensor, kept: Tensor | None = None) -> None:
        """Writes scores [B_text, P] and the blocks; takes products that an earlier one kept."""
        words, (K, R) = self.words, self.s.shape[1:]
        if kept is None:
            torch.bmm(self.every_words, self.picture.mT, out=self.s)
        else:
            self.s.copy_(kept[:, :K, :R])
        _C.region_word_attention_cpu(
            *(words.float64, self.s.data_ptr(), self.alpha.data_ptr(), self.dots.data_ptr()),
            *(*self.sizes, R, words.sharp, words.word_softmax, threads()),
        )
        if kept is not None:
            self.product.copy_(kept[:, :K, R:])
        elif words.gram:
            torch.bmm(self.picture, self.picture.mT, out=self.inner)
            torch.bmm(self.alpha, self.inner, out=self.h)
        else:
            torch.bmm(self.alpha, self.picture, out=self.inner)
        a = self.alpha if words.gram else self.inner
        _C.region_word_pool_cpu(
            *(words.float64, a.data_ptr(), self.product.data_ptr(), a.shape[2]),
            *(self.dots.data_ptr(), words.rnorm.data_ptr(), self.square.data_ptr(), *self.sizes),
            *(words.pool, scores.data_ptr(), scores.stride(0), threads()),
        )

    def backward(self, dscores: Tensor) -> Tensor:
        """Turns s into ds, writes radial [P, K], and returns the gradient of the regions."""
        words, R = self.words, self.s.shape[2]
        if not words.gram:
            torch.bmm(self.inner, self.picture.mT, out=self.h)
        _C.region_word_bwd_cpu(  # h becomes alpha d|c|^2
            *(words.float64, self.s.data_ptr(), self.alpha.data_ptr(), self.h.data_ptr()),
            *(self.dots.data_ptr(), words.rnorm.data_ptr(), self.square.data_ptr(), *self.sizes),
            *(R, words.sharp, words.pool, words.word_softmax, dscores.data_ptr()),
            *(dscores.stride(0), self.radial.data_ptr(), threads()),
        )
        grad = torch.bmm(self.s.mT, self.every_words)
        if words.gram:
            torch.bmm(self.alpha.mT, self.h, out=self.inner)
            grad.baddbmm_(self.inner, self.picture, alpha=2)
        else:
            grad.baddbmm_(self.h.mT, self.inner, alpha=2)
        if not words.word_softmax:  # orthogonal to the rows, but where a norm was too small to use
            along = torch.linalg.vecdot(grad, self.picture)[..., None]
            along.masked_fill_(self.norm <= EPS**0.5, 0)
            grad.addcmul_(along, self.picture, value=-1).div_(self.norm)
        return grad


def fwd(regions, words, lengths, *options) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(regions, words)
    packed = _Words(regions, words.to(dtype), lengths, *options)
    scores = words.new_empty(len(words), len(regions), dtype=dtype)
    kept = words.new_zeros(kept_shape(regions, words), dtype=dtype)
    for some in packed.blocks(regions):
        block = _Block(packed, regions[some])
        block.forward(scores[:, some])
        if len(kept):
            kept[some, : len(packed.packed)] = torch.cat([block.s, block.product], 2)
    return scores, kept


def bwd(
    dscores, regions, words, lengths, kept, sharp, pool, word_softmax, of_words
) -> tuple[Tensor, Tensor]:
    dscores = dscores.contiguous()
    packed = _Words(regions, words.to(dscores.dtype), lengths, sharp, pool, word_softmax)
    dpacked, dregions = torch.zeros_like(packed.packed), torch.empty_like(regions)
    for some in packed.blocks(regions):
        block = _Block(packed, regions[some])
        block.forward(torch.empty_like(dscores)[:, some], kept[some] if len(kept) else None)
        dregions[some] = block.backward(dscores[:, some])
        if of_words:
            dpacked.addcmul_(block.radial.sum(0)[:, None], packed.packed)
            for ds, picture in zip(block.s, block.picture):
                dpacked.addmm_(ds, picture)
    dwords = torch.zeros_like(words)
    dwords[packed.valid] = dpacked.to(words.dtype)
    return dregions, dwords
