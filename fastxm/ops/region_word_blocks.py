"""Region-word scores some pictures at a time: vendor products and native passes over their blocks,
on a CPU by C++, on a GPU by CUDA.

What is made of a picture are [K, R] blocks over the K words of all texts. With the rows r of a
picture, s = w rᵀ, alpha = softmax(s) and the contexts c = alpha r. Where c itself is not made:

    <w, c> = sum_r alpha s        |c|^2 = sum_r alpha h,    h = c rᵀ = alpha (r rᵀ)
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import gemm
from fastxm.ops import region_word_products as products
from fastxm.ops.dispatch import threads, wide_dtype
from fastxm.ops.region_word_rows import Texts, norms, through_norms

BLOCK = 8 << 20  # bytes that s, alpha and h may take together: they are to stay in the cache
LAUNCH = 8  # on a GPU as many of them, so that its work outlasts a launch


class _Words:
    """The words of all texts, packed, and the options."""

    def __init__(self, regions, words, lengths, sharp, pool, word_softmax):
        self.gram, self.products = products.gram(regions, words), products.of(regions, words)
        self.texts = Texts(words, lengths)
        self.packed = self.texts.pack(words).to(self.products.dtype)  # [K, D]
        self.wide = wide_dtype(regions, words)
        self.rnorm = norms(self.packed, self.wide).reciprocal()
        # <w, c> and |c|^2 are to be of one c: its rounding then turns it, and little else
        self.of_dots = 0 if self.gram else self.packed.to(self.wide)
        self.sharp, self.pool, self.word_softmax = sharp, pool, word_softmax


class _Block:
    """Regions [P, R, D] of some pictures, of any dtype, and what the words make of them."""

    def __init__(self, words: _Words, regions: Tensor, rooms: list[Tensor]):
        (P, _, D), K, texts = regions.shape, words.texts.K, words.texts
        self.words, self.every_words = words, words.packed.expand(P, K, D)
        (self.picture, self.grad, self.s, self.alpha, self.h, self.inner, self.dots, self.square,
         self.radial) = (room[:P] for room in rooms)  # fmt: skip
        self.ds, self.twice = self.s, self.h
        self.norm = None if words.word_softmax else norms(regions, words.wide)
        torch.div(regions, 1 if self.norm is None else self.norm, out=self.picture)
        self.sizes = (texts.starts.data_ptr(), len(texts.valid), P, K)

    def keep(self, s: Tensor, product: Tensor) -> None:
        """Lets s and the contexts (or h) have their places elsewhere."""
        self.s = s
        setattr(self, "h" if self.words.gram else "inner", product)

    def run(self, part: str, *arguments: Any) -> None:
        """What fastxm._C does to the blocks; tensors are given as their addresses."""
        given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        queue, float64 = gemm.stream(self.s), self.words.wide == torch.float64
        where, by = ("cpu", threads()) if queue is None else ("cuda", queue)
        with torch.cuda.device_of(self.s):
            getattr(_C, f"region_word_{part}_{where}")(float64, *given, by)

    def forward(self, scores: tuple[int, int], *, again: bool = True) -> None:
        """Writes the blocks, and scores [B_text, P]: address or 0, stride.

        again: also s and the contexts (or h), which else are there.
        """
        words, R = self.words, self.s.shape[2]
        if again:
            words.products.with_regions(self.every_words, self.picture, self.s)
        given = (self.s, self.alpha, self.dots, *self.sizes, R, words.sharp, words.word_softmax)
        self.run("attention", *given)
        if again and words.gram:
            words.products.with_regions(self.picture, self.picture, self.inner)
            words.products.contexts(self.alpha, self.inner, self.h)
        elif again:
            words.products.contexts(self.alpha, self.picture, self.inner)
        pair = (self.alpha, self.h) if words.gram else (self.inner, self.inner)
        given = (self.dots, words.rnorm, self.square, *self.sizes, words.pool, *scores)
        self.run("pool", *pair, pair[0].shape[2], words.of_dots, *given)

    def backward(self, dscores: Tensor) -> Tensor:
        """Writes ds and radial [P, K], and returns the gradient of the regions."""
        words, R = self.words, self.s.shape[2]
        if not words.gram:
            words.products.with_regions(self.inner, self.picture, self.h)
        self.run(
            *("bwd", self.s, self.ds, self.alpha, self.h, self.twice, self.dots, words.rnorm),
            *(self.square, *self.sizes, R, words.sharp, words.pool, words.word_softmax),
            *(dscores, dscores.stride(0), self.radial),
        )
        if words.gram:
            torch.bmm(self.alpha.mT, self.twice, out=self.inner)
        pair = (self.inner, self.picture) if words.gram else (self.twice, self.inner)
        words.products.to_regions(self.ds, self.every_words, *pair, self.grad)
        if self.norm is not None:
            through_norms(self.grad, self.picture, self.norm)
        return self.grad


def _blocks(words: _Words, regions: Tensor) -> Iterator[tuple[slice, _Block]]:
    """Yields each group of pictures, as a slice, and its block, in rooms that all groups share."""
    (B, R, D), K = regions.shape, words.texts.K
    room = BLOCK * (LAUNCH if regions.is_cuda else 1)
    P = max(1, min(B, room // max(1, 3 * K * R * words.rnorm.element_size())))
    inner = (R, R) if words.gram else (K, D)  # r rᵀ, or the contexts
    shapes = ((R, D), (R, D), (K, R), (K, R), (K, R), inner, (K,), (K,), (K,))
    dtypes = [words.products.dtype] + [words.wide] * 8
    # kernels leave what is of no word as it is
    new = regions.new_empty if words.texts.counted else regions.new_zeros
    rooms = [new((P, *shape), dtype=dtype) for shape, dtype in zip(shapes, dtypes)]
    for i in range(0, B, P):
        yield slice(i, i + P), _Block(words, regions[i : i + P], rooms)


def fwd(regions, words, lengths, kept, *options) -> Tensor:
    packed = _Words(regions, words, lengths, *options)
    scores = kept.new_empty(len(words), len(regions))
    places = products.kept_places(kept, regions, packed.texts.K)
    if places is None:
        kept.fill_(torch.nan)  # which tells Triton's backward that nothing was kept
    for some, block in _blocks(packed, regions):
        if places is not None:
            block.keep(*(place[some] for place in places))
        block.forward((scores[:, some].data_ptr(), len(regions)))
    return scores


def bwd(dscores, regions, words, lengths, kept, *options, of_words) -> tuple[Tensor, Tensor]:
    dscores = dscores.contiguous()
    packed = _Words(regions, words, lengths, *options)
    places = products.found_places(kept, regions, packed.texts.K)
    dpacked = torch.zeros_like(packed.packed, dtype=packed.wide)
    dregions = torch.empty_like(regions)
    for some, block in _blocks(packed, regions):
        if places is not None:
            block.keep(*(place[some] for place in places))
        block.forward((0, 0), again=places is None)
        dregions[some] = block.backward(dscores[:, some])
        if of_words:
            dpacked.addcmul_(block.radial.sum(0)[:, None], packed.packed)
            for ds, picture in zip(block.ds, block.picture):
                packed.products.to_words(ds, picture, dpacked)
    if not of_words:
        return dregions, words.new_empty(0)
    return dregions, packed.texts.unpack(dpacked).to(words.dtype)
