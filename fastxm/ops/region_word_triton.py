"""Region-word scores by Triton, in O(strip) memory: `region_word_strips`, some pictures at a time.

The forward leaves |c|^2 to the backward, which makes all else again; in float32 for float16, in
which the gradient of one pair of thousands would be 0.
"""

import torch
from torch import Tensor

from fastxm.ops.region_word_strips import Words


def _dtype(regions: Tensor, words: Tensor) -> torch.dtype:
    return torch.promote_types(regions.dtype, words.dtype)


def fwd(regions, words, lengths, kept, *options) -> Tensor:
    packed = Words(_dtype(regions, words), regions, words, lengths, *options)
    scores = kept.new_full((len(words), len(regions)), -torch.inf)
    kept.fill_(torch.nan)  # which tells any backward that nothing was kept
    with torch.cuda.device_of(words):
        for some, strip in packed.strips(regions):
            squares = strip.new(*strip.table)
            scores[:, some] = packed.texts.pool(strip.forward(squares, again=False), packed.pool)
            if kept.shape[2] == 1:
                kept[some, : squares.shape[1], 0] = squares
    return scores


def bwd(dscores, regions, words, lengths, kept, *options, of_words) -> tuple[Tensor, Tensor]:
    dtype = _dtype(regions, words)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    known = kept.shape[2] == 1 and dtype == _dtype(regions, words)
    packed = Words(dtype, regions, words, lengths, *options)
    dpacked = torch.zeros_like(packed.packed, dtype=torch.float32)
    dregions = torch.zeros_like(regions)
    R, D = regions.shape[1:]
    with torch.cuda.device_of(words):
        for some, strip in packed.strips(regions):
            squares = strip.new(*strip.table).fill_(torch.nan)
            if known:
                squares.copy_(kept[some, : squares.shape[1], 0])
            strip.forward(squares, again=known)
            grad, dwords = strip.backward(dscores[:, some], of_words)
            dregions[some] = grad[:, :R, :D]
            if dwords is not None:
                dpacked += dwords
    if not of_words:
        return dregions, words.new_empty(0)
    return dregions, packed.texts.unpack(dpacked[:, :D]).to(words.dtype)
