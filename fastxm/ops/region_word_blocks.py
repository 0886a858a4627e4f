"""Region-word scores some pictures at a time: vendor GEMM and the C++ epilogues of fastxm._C.

What is kept of a picture are [K, R] blocks over the K words of all texts. With the rows r of a
picture, s = w rᵀ, alpha = softmax(s) and the contexts c = alpha r:

    <w, c> = sum_r alpha s        |c|^2 = sum_r alpha h,    h = c rᵀ = alpha (r rᵀ)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import region_word_products as products
from fastxm.ops.dispatch import threads, wide_dtype
from fastxm.ops.region_word_reference import EPS, valid_words

BLOCK = 8 << 20  # bytes that s, alpha and h may take together: they are to stay in the cache


def _norm(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[.., 1]: the norms of rows, at least 1e-6."""
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype).clamp_min_(EPS**0.5)


class _Words:
    """The words of all texts, packed, and the options."""

    def __init__(self, regions, words, lengths, sharp, pool, word_softmax):
        self.gram, self.products = products.gram(regions, words), products.of(regions, words)
        self.valid, self.texts = valid_words(words, lengths), len(words)
        self.packed = words[self.valid].to(self.products.dtype)  # [K, D]
        self.starts = torch.nn.functional.pad(self.valid.sum(1).cumsum(0), (1, 0))
        self.wide = wide_dtype(regions, words)
        self.rnorm = _norm(self.packed, self.wide).reciprocal()
        self.sharp, self.pool, self.word_softmax = sharp, pool, word_softmax
        self.float64 = self.wide == torch.float64


class _Block:
    """Regions [P, R, D] of some pictures, of any dtype, and what the words make of them."""

    def __init__(self, words: _Words, regions: Tensor, rooms: list[Tensor]):
        (P, _, D), K = regions.shape, len(words.packed)
        self.words, self.every_words = words, words.packed.expand(P, K, D)
        (self.picture, self.grad, self.s, self.alpha, self.h, self.inner, self.dots, self.square,
         self.radial) = (room[:P] for room in rooms)  # fmt: skip
        self.norm = torch.ones(()) if words.word_softmax else _norm(regions, words.wide)
        torch.div(regions, self.norm, out=self.picture)
        self.product = self.h if words.gram else self.inner
        self.sizes = (words.starts.data_ptr(), words.texts, P)

    def forward(self, scores: tuple[int, int], kept: Tensor | None = None) -> None:
        """Writes the blocks, and scores [B_text, P]: address or 0, stride. Takes what is kept."""
        words, (K, R) = self.words, self.s.shape[1:]
        if kept is None:
            words.products.with_regions(self.every_words, self.picture, self.s)
        else:
            self.s.copy_(kept[:, :K, :R])
            self.product.copy_(kept[:, :K, R:])
        _C.region_word_attention_cpu(
            *(words.float64, self.s.data_ptr(), self.alpha.data_ptr(), self.dots.data_ptr()),
            *(*self.sizes, R, words.sharp, words.word_softmax, threads()),
        )
        if kept is None and words.gram:
            words.products.with_regions(self.picture, self.picture, self.inner)
        if kept is None:
            of = self.inner if words.gram else self.picture
            words.products.contexts(self.alpha, of, self.product)
        a = self.alpha if words.gram else self.inner
        _C.region_word_pool_cpu(
            *(words.float64, a.data_ptr(), self.product.data_ptr(), a.shape[2]),
            *(self.dots.data_ptr(), words.rnorm.data_ptr(), self.square.data_ptr(), *self.sizes),
            *(words.pool, *scores, threads()),
        )

    def backward(self, dscores: Tensor) -> Tensor:
        """Turns s into ds, writes radial [P, K], and returns the gradient of the regions."""
        words, R = self.words, self.s.shape[2]
        if not words.gram:
            words.products.with_regions(self.inner, self.picture, self.h)
        _C.region_word_bwd_cpu(  # h becomes 2 alpha d|c|^2
            *(words.float64, self.s.data_ptr(), self.alpha.data_ptr(), self.h.data_ptr()),
            *(self.dots.data_ptr(), words.rnorm.data_ptr(), self.square.data_ptr(), *self.sizes),
            *(R, words.sharp, words.pool, words.word_softmax, dscores.data_ptr()),
            *(dscores.stride(0), self.radial.data_ptr(), threads()),
        )
        if words.gram:
            torch.bmm(self.alpha.mT, self.h, out=self.inner)
        pair = (self.inner, self.picture) if words.gram else (self.h, self.inner)
        words.products.to_regions(self.s, self.every_words, *pair, self.grad)
        grad = self.grad
        if not words.word_softmax:  # orthogonal to the rows, but where a norm was too small to use
            along = torch.linalg.vecdot(grad, self.picture.to(grad.dtype))[..., None]
            along.masked_fill_(self.norm <= EPS**0.5, 0)
            grad.addcmul_(along, self.picture, value=-1).div_(self.norm)
        return grad


def _blocks(words: _Words, regions: Tensor) -> Iterator[tuple[slice, _Block]]:
    """Yields each group of pictures, as a slice, and its block, in rooms that all groups share."""
    (B, R, D), K = regions.shape, len(words.packed)
    P = max(1, min(B, BLOCK // max(1, 3 * K * R * words.packed.element_size())))
    inner = (R, R) if words.gram else (K, D)  # r rᵀ, or the contexts
    shapes = ((R, D), (R, D), (K, R), (K, R), (K, R), inner, (K,), (K,), (K,))
    dtypes = [words.products.dtype] + [words.wide] * 8
    rooms = [regions.new_empty(P, *s, dtype=dtype) for s, dtype in zip(shapes, dtypes)]
    for i in range(0, B, P):
        yield slice(i, i + P), _Block(words, regions[i : i + P], rooms)


def fwd(regions, words, lengths, kept, *options) -> Tensor:
    packed = _Words(regions, words, lengths, *options)
    R, K = regions.shape[1], len(packed.packed)
    scores = kept.new_empty(len(words), len(regions))
    for some, block in _blocks(packed, regions):
        block.forward((scores[:, some].data_ptr(), len(regions)))
        if len(kept):  # nothing reads the rest of it, which is of no words
            kept[some, :K, :R], kept[some, :K, R:] = block.s, block.product
    return scores


def bwd(dscores, regions, words, lengths, kept, *options, of_words) -> tuple[Tensor, Tensor]:
    dscores = dscores.contiguous()
    packed = _Words(regions, words, lengths, *options)
    # NaN is the mark of a backend that keeps nothing; one of the inputs' comes again
    again = not len(kept) or bool(kept[0, : len(packed.packed), 0].isnan().any())
    dpacked = torch.zeros_like(packed.packed, dtype=packed.wide)
    dregions = torch.empty_like(regions)
    for some, block in _blocks(packed, regions):
        block.forward((0, 0), None if again else kept[some])
        dregions[some] = block.backward(dscores[:, some])
        if of_words:
            dpacked.addcmul_(block.radial.sum(0)[:, None], packed.packed)
            for ds, picture in zip(block.s, block.picture):
                packed.products.to_words(ds, picture, dpacked)
    if not of_words:
        return dregions, words.new_empty(0)
    dwords = torch.zeros_like(words)
    dwords[packed.valid] = dpacked.to(words.dtype)
    return dregions, dwords
