"""Region-word scores on a CPU whose products stand in tiles (`fastxm.ops.gemm.LEVEL`).

A tile has the words of some texts and one picture. Its products, softmax and gradients follow each
other in the cache; in bfloat16 the factors of products are rounded, and all else is float32. What
products share, the panels of a block of pictures, is made once for all words.
"""

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import region_word_products as products
from fastxm.ops.dispatch import threads
from fastxm.ops.region_word_rows import Texts, norms

BLOCK = 4 << 20  # bytes of the panels of pictures, and of what words make of them, together


class _Given:
    """The inputs as the kernels take them."""

    def __init__(self, regions, words, lengths, sharp, pool, word_softmax):
        dtype = products.tile_dtype(regions, words)
        assert dtype is not None
        self.texts, (P, R, D) = Texts(words, lengths), regions.shape
        self.regions = regions.to(dtype).contiguous()
        self.packed = self.texts.pack(words).to(dtype)  # [K, D]
        self.rnorm = norms(self.packed, torch.float32).reciprocal()
        self.options, K = (sharp, pool), self.texts.K
        row = 2 * R * D + K * (3 * R + D)  # panels, and of the backward ds, alpha and contexts
        block = max(1, min(P, BLOCK // (row * dtype.itemsize)))
        self.sizes = (dtype == torch.bfloat16, P, R, D, len(words), K, word_softmax, block)

    def numbers(self, places: tuple[Tensor, Tensor] | None) -> list[int]:
        """RegionWordGiven of csrc/cpu/region_word.h."""
        tensors = [self.regions, self.packed, self.rnorm, self.texts.starts, *(places or ())]
        sizes = (*self.sizes, 0 if places is None else len(places[0]))
        return [*map(int, sizes), *(t.data_ptr() for t in tensors), *[0] * (6 - len(tensors))]


def fwd(regions, words, lengths, kept, *options) -> Tensor:
    given = _Given(regions, words, lengths, *options)
    scores = kept.new_empty(len(words), len(regions))
    numbers = given.numbers(products.kept_places(kept, regions, given.texts.K))
    address, stride = scores.data_ptr(), len(regions)
    _C.region_word_tiles_fwd_cpu(numbers, *given.options, address, stride, threads())
    return scores


def bwd(dscores, regions, words, lengths, kept, *options, of_words) -> tuple[Tensor, Tensor]:
    given = _Given(regions, words, lengths, *options)
    dscores, dregions = dscores.contiguous(), torch.empty_like(given.regions)
    dpacked = torch.zeros_like(given.packed, dtype=torch.float32) if of_words else None
    numbers = given.numbers(products.found_places(kept, regions, given.texts.K))
    _C.region_word_tiles_bwd_cpu(
        *(numbers, *given.options, dscores.data_ptr(), dscores.stride(0), dregions.data_ptr()),
        *(0 if dpacked is None else dpacked.data_ptr(), threads()),
    )
    dregions = dregions.to(regions.dtype)
    if dpacked is None:
        return dregions, words.new_empty(0)
    return dregions, given.texts.unpack(dpacked).to(words.dtype)
