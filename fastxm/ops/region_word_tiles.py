"""Region-word scores on a CPU whose products stand in tiles (`fastxm.ops.gemm.LEVEL`).

A tile has the words of some texts and one picture. Its products, softmax and gradients follow each
other in the cache; in bfloat16 the factors of products are rounded, and all else is float32. Of a
picture all is done by one thread, which packs once what the products of all words share; only the
words' gradients are sums over pictures, and are taken from a block of them.
"""

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops import region_word_products as products
from fastxm.ops.dispatch import threads
from fastxm.ops.region_word_rows import Texts, norms

BLOCK = 8 << 20  # bytes of what the words' gradients take of a block of pictures


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
        gram, bf16 = products.gram(regions, words), dtype == torch.bfloat16
        blocks = max(1, -(-P * R * (D + K) * dtype.itemsize // BLOCK))
        block = -(-P // (blocks * threads())) * threads()  # pictures of each: no thread waits long
        self.sizes = (bf16, P, R, D, len(words), K, word_softmax, gram, block)

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
