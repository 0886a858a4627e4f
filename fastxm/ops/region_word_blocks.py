"""The two ways to region-word scores, a picture at a time: plain PyTorch, and C++ epilogues."""

import torch
from torch import Tensor

from fastxm.ops.dispatch import unit_rows, wide

EPS = 1e-12  # of the squared norms, as in unit_rows


def valid_words(words: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(words.shape[1], device=words.device) < lengths[:, None]  # [B_text, T]


def _attention(regions, words, valid, sharp, word_softmax) -> tuple[Tensor, Tensor]:
    """Softmax over words (or the dot products) and over regions, both [B_text, T, R]."""
    s = words @ regions.T
    if word_softmax:
        # finite, so that a text without words has no NaN; its words are masked again in the pooling
        s = s.masked_fill(~valid[..., None], torch.finfo(s.dtype).min).softmax(1)
    return s, (sharp * s).softmax(2)


def formula(regions, words, lengths, sharp, pool, word_softmax) -> Tensor:
    regions, words = wide(regions, words)
    valid, unit = valid_words(words, lengths), unit_rows(words)
    columns = []
    for picture in regions:
        _, alpha = _attention(picture, words, valid, sharp, word_softmax)
        cosine = (unit * unit_rows(alpha @ picture)).sum(2)  # [B_text, T]
        columns.append((pool * cosine).masked_fill(~valid, -torch.inf).logsumexp(1) / pool)
    return torch.stack(columns, 1) if columns else words.new_empty(len(words), 0)


def formula_bwd(
    dscores, regions, words, lengths, scores, sharp, pool, word_softmax
) -> tuple[Tensor, Tensor]:
    wide_regions, wide_words = wide(regions, words)
    valid, unit = valid_words(words, lengths), unit_rows(words)
    rnorm = wide_words.square().sum(2, True).clamp_min(EPS).rsqrt()
    dregions, dwords = torch.empty_like(wide_regions), torch.zeros_like(wide_words)
    for i, picture in enumerate(wide_regions):
        beta, alpha = _attention(picture, wide_words, valid, sharp, word_softmax)
        context = alpha @ picture
        context_rnorm = context.square().sum(2, True).clamp_min(EPS).rsqrt()
        direction = context * context_rnorm
        cosine = (unit * direction).sum(2, True)
        weight = (pool * (cosine - scores[:, i, None, None])).exp() * dscores[:, i, None, None]
        dcosine = weight.masked_fill(~valid[..., None], 0)  # [B_text, T, 1]
        dwords += dcosine * rnorm * (direction - cosine * unit)
        dcontext = dcosine * context_rnorm * (unit - cosine * direction)
        dalpha = dcontext @ picture.T
        ds = sharp * alpha * (dalpha - (alpha * dalpha).sum(2, True))
        if word_softmax:
            ds = beta * (ds - (beta * ds).sum(1, True))
        dwords += ds @ picture
        dregions[i] = (ds.transpose(1, 2) @ wide_words + alpha.transpose(1, 2) @ dcontext).sum(0)
    return dregions.to(regions.dtype), dwords.to(words.dtype)
