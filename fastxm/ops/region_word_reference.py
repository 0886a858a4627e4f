"""Region-word scores in plain PyTorch, a picture at a time, and their gradients."""

import torch
from torch import Tensor

from fastxm.ops.dispatch import unit_rows, wide
from fastxm.ops.vjp import vjp

EPS = 1e-12  # least squared norm, as in unit_rows


def valid_words(words: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(words.shape[1], device=words.device) < lengths[:, None]  # [B_text, T]


def unit_rows_bwd(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of unit_rows(x)."""
    square = x.square().sum(-1, True)
    rnorm = square.clamp_min(EPS).rsqrt()
    along = (grad * x).sum(-1, True) * rnorm.square()
    return rnorm * torch.where(square > EPS, grad - along * x, grad)


def _attention(regions, words, valid, sharp, word_softmax) -> tuple[Tensor, Tensor]:
    """Softmax over words (or the dot products) and over regions, both [B_text, T, R]."""
    s = words @ regions.T
    if word_softmax:
        # finite, so that a text without words has no NaN; its words are masked again in the pooling
        s = s.masked_fill(~valid[..., None], torch.finfo(s.dtype).min).softmax(1)
    return s, (sharp * s).softmax(2)


def fwd(regions, words, lengths, kept, *options) -> Tensor:
    kept.fill_(torch.nan)  # which tells any backward that nothing was kept
    return formula(regions, words, lengths, *options)


def formula(regions, words, lengths, sharp, pool, word_softmax) -> Tensor:
    regions, words = wide(regions, words)
    valid, unit = valid_words(words, lengths), unit_rows(words)
    columns = []
    for picture in regions if word_softmax else unit_rows(regions):
        _, alpha = _attention(picture, words, valid, sharp, word_softmax)
        cosine = (unit * unit_rows(alpha @ picture)).sum(2)  # [B_text, T]
        columns.append((pool * cosine).masked_fill(~valid, -torch.inf).logsumexp(1) / pool)
    return torch.stack(columns, 1) if columns else words.new_empty(len(words), 0)


def bwd(
    dscores, regions, words, lengths, _kept, sharp, pool, word_softmax, *, of_words
) -> tuple[Tensor, Tensor]:
    wide_regions, wide_words = wide(regions, words)
    valid, unit = valid_words(words, lengths), unit_rows(words)
    rnorm = wide_words.square().sum(2, True).clamp_min(EPS).rsqrt()
    dregions = torch.empty_like(wide_regions)
    dwords = torch.zeros_like(wide_words) if of_words else wide_words.new_empty(0)
    for i, raw in enumerate(wide_regions):
        picture = raw if word_softmax else unit_rows(raw)
        beta, alpha = _attention(picture, wide_words, valid, sharp, word_softmax)
        context = alpha @ picture
        context_rnorm = context.square().sum(2, True).clamp_min(EPS).rsqrt()
        direction = context * context_rnorm
        cosine = (unit * direction).sum(2, True)
        weight = (pool * cosine).masked_fill(~valid[..., None], -torch.inf).softmax(1)
        dcosine = dscores[:, i, None, None] * weight.masked_fill(~valid[..., None], 0)
        dcontext = dcosine * context_rnorm * (unit - cosine * direction)
        dalpha = dcontext @ picture.T
        ds = sharp * alpha * (dalpha - (alpha * dalpha).sum(2, True))
        if word_softmax:
            ds = beta * (ds - (beta * ds).sum(1, True))
        if of_words:
            dwords += dcosine * rnorm * (direction - cosine * unit) + ds @ picture
        grad = (ds.transpose(1, 2) @ wide_words + alpha.transpose(1, 2) @ dcontext).sum(0)
        dregions[i] = grad if word_softmax else unit_rows_bwd(grad, raw)
    return dregions.to(regions.dtype), dwords.to(words.dtype)


def scores(regions, words, lengths, sharp, pool, word_softmax, keep) -> tuple[Tensor, Tensor]:
    """What `region_word_op.scores` gives, differentiable to any order."""
    return formula(regions, words, lengths, sharp, pool, word_softmax), words.new_empty(0)


def differentiable_bwd(
    dscores, regions, words, lengths, kept, sharp, pool, word_softmax, of_words
) -> list[Tensor | None]:
    """What `region_word_op.gradients` gives as the formula's own, to be differentiated again."""
    rest = (lengths, sharp, pool, word_softmax)
    return vjp(lambda r, w: formula(r, w, *rest), (regions, words), (dscores,))
