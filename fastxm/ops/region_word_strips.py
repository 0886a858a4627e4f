"""Region-word scores in strips of all words and some pictures, by Triton's kernels.

|c|^2 comes from r rᵀ where that is cheaper, R <= D; but of few regions, of which c may be much
shorter than they are, and of halves of any length (word_softmax) it would lose its digits.
"""

import importlib
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fastxm.ops import gemm
from fastxm.ops.region_word_reference import EPS
from fastxm.ops.region_word_rows import Texts, norms, through_norms

STRIP = 1 << 30  # bytes of the strips of some pictures together: each takes some 80 launches
COLUMNS = 1 << 22  # of a strip: offsets in a tile of it stay within 32 bits


def _whole(n: int) -> int:
    """n as a multiple of 16, at least one: of such rows tiles are fetched in vectors."""
    return max(16, -(-n // 16) * 16)


class Words:
    """The words of all texts, packed, and the options."""

    def __init__(self, dtype, regions, words, lengths, sharp, pool, word_softmax):
        (_, R, D), self.texts, self.dtype = regions.shape, Texts(words, lengths), dtype
        packed = self.texts.pack(words)
        self.rnorm = norms(packed, torch.float32)[:, 0].reciprocal()
        self.packed = torch.nn.functional.pad(packed.to(dtype), (0, _whole(D) - D))
        self.sharp, self.pool, self.word_softmax = sharp, pool, word_softmax
        half = dtype != torch.float32
        self.gram = 32 < R <= D and not (half and word_softmax)
        self.gram_dtype = torch.float16 if half else dtype  # of numbers in [-1, 1]
        self.precision = "ieee" if half else gemm.triton_precision()
        self.count = self.texts.starts[-1:]

    def strips(self, regions: Tensor) -> Iterator[tuple[slice, "Strip"]]:
        """Yields groups of pictures, as a slice, and their strips; nothing where no word is."""
        width = _whole(regions.shape[1])
        depth = 0 if self.gram else self.packed.shape[1]
        row = 20 * width + 4 * depth  # bytes of s, alpha, ds, twice and g, and of the contexts
        most = max(1, min(STRIP // max(1, self.texts.K * row), COLUMNS // width))
        strips = max(1, -(-len(regions) // most))
        P = max(1, -(-len(regions) // strips))  # a short last strip would be tuned by itself
        for i in range(0, len(regions) if self.texts.K else 0, P):
            some = slice(i, min(i + P, len(regions)))
            yield some, Strip(self, regions[some])


class Strip:
    """Regions of P pictures, in `rows` [P, width, D], and what the words make of them."""

    def __init__(self, words: Words, regions: Tensor):
        self.kernels = importlib.import_module("fastxm.kernels.region_word")
        self.gemm = importlib.import_module("fastxm.kernels.gemm")
        (P, R, D), self.words, self.R = regions.shape, words, regions.shape[1]
        self.norm = None if words.word_softmax else norms(regions, torch.float32)
        self.rows = regions.new_zeros(P, _whole(R), _whole(D), dtype=words.dtype)
        self.rows[:, :R, :D] = regions if self.norm is None else regions / self.norm
        self.shape, self.table = (words.texts.K, P, _whole(R)), (P, words.texts.K)
        self.s = self.new(*self.shape)
        self.product(words.packed[None], self.rows.flatten(0, 1).T[None], self.s, "ROWS")

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.rows.new_empty(shape, dtype=dtype)

    def product(self, a: Tensor, b: Tensor, out: Tensor, words: str) -> Tensor:
        """out = a b; words are the "ROWS" of a, or what is summed over ("DEPTH"), or neither."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        counted = getattr(self.gemm, words)
        self.gemm.product(a, b, out.view(shape), self.words.count, counted, self.words.precision)
        return out

    @cached_property
    def factors(self) -> Tensor:
        """What alpha is multiplied by for |c|^2: r rᵀ [P, width, width], or r [P, width, D]."""
        if not self.words.gram:
            return self.rows
        P, width, _ = self.rows.shape
        gram = self.new(P, width, width, dtype=self.words.gram_dtype)
        return self.product(self.rows, self.rows.mT, gram, "NEITHER")

    def forward(self, squares: Tensor, *, again: bool) -> Tensor:
        """Writes squares [P, K], which may be there `again`; returns the cosines [P, K]."""
        words, kernels, (K, P, _) = self.words, self.kernels, self.shape
        self.alpha = self.new(*self.shape, dtype=self.factors.dtype)
        self.dots, self.squares = self.new(*self.table), squares
        self.over_words = (
            kernels.columns(self.s, words.texts.starts) if words.word_softmax else None
        )
        kernels.rows(self.s, self.alpha, self.dots, words.count, words.texts.text,
                     self.over_words, self.R, words.sharp)  # fmt: skip
        depth = self.rows.shape[2]
        self.contexts = None if words.gram else self.new(K, P, depth, dtype=words.dtype)
        kernels.square(self.alpha, self.factors, self.contexts, squares, words.count, again,
                       words.precision)  # fmt: skip
        self.cosines = self.dots * words.rnorm * squares.clamp_min(EPS).rsqrt()
        return self.cosines

    def backward(self, dscores: Tensor, of_words: bool) -> tuple[Tensor, Tensor | None]:
        """The gradients of the regions and, if wanted, of the packed words."""
        words, kernels, (K, P, width) = self.words, self.kernels, self.shape
        dcosines = words.texts.pool_bwd(dscores, self.cosines, words.pool)
        square = self.squares.clamp_min(EPS)
        ddots = dcosines * words.rnorm * square.rsqrt()
        dsquares = torch.where(self.squares > EPS, dcosines * self.cosines / (-2 * square), 0)
        ds, twice = (self.new(*self.shape, dtype=words.dtype) for _ in range(2))
        g = self.new(*self.shape) if words.word_softmax else ds
        a = self.alpha if self.contexts is None else self.contexts
        kernels.gradient(a, self.factors, self.s, self.alpha,
                         (self.dots, self.squares, ddots, dsquares), g, twice, words.count,
                         words.sharp, words.word_softmax, words.precision)  # fmt: skip
        if self.over_words is not None:
            kernels.through(self.s, self.alpha, g, ds, ddots, words.texts.starts, self.over_words)
        flat, depth = ds.view(1, K, P * width), self.rows.shape[2]
        grad = self.product(flat.mT, words.packed[None], self.new(P, width, depth), "DEPTH")
        more = self.new(P, width, depth)
        if self.contexts is None:  # 2 d(r rᵀ) r
            dgram = self.new(P, width, width, dtype=words.dtype)
            self.product(self.alpha.permute(1, 2, 0), twice.transpose(0, 1), dgram, "DEPTH")
            self.product(dgram, self.rows, more, "NEITHER")
        else:
            self.product(twice.permute(1, 2, 0), self.contexts.transpose(0, 1), more, "DEPTH")
        grad += more
        if self.norm is not None:
            through_norms(grad[:, : self.R], self.rows[:, : self.R], self.norm)
        if not of_words:
            return grad, None
        rows = self.rows.view(1, P * width, depth)
        dwords = self.product(flat, rows, self.new(K, depth), "ROWS")
        radial = (dcosines * self.cosines).sum(0) * words.rnorm.square()
        return grad, dwords.addcmul_(radial[:, None], words.packed, value=-1)
