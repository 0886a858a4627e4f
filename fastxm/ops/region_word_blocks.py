"""The two ways to region-word scores, a picture at a time: plain PyTorch, and C++ epilogues."""

import torch
from torch import Tensor

from fastxm import _C
from fastxm.ops.dispatch import choose, threads, unit_rows, vjp, wide

EPS = 1e-12  # least squared norm, as in unit_rows


def backend(words: Tensor) -> str:
    auto = "cpu" if words.device.type == "cpu" else "reference"
    return choose("region_word", words.device, auto, ("reference", "cpu"))


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
    dscores, regions, words, lengths, sharp, pool, word_softmax
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
        weight = (pool * cosine).masked_fill(~valid[..., None], -torch.inf).softmax(1)
        dcosine = dscores[:, i, None, None] * weight.masked_fill(~valid[..., None], 0)
        dwords += dcosine * rnorm * (direction - cosine * unit)
        dcontext = dcosine * context_rnorm * (unit - cosine * direction)
        dalpha = dcontext @ picture.T
        ds = sharp * alpha * (dalpha - (alpha * dalpha).sum(2, True))
        if word_softmax:
            ds = beta * (ds - (beta * ds).sum(1, True))
        dwords += ds @ picture
        dregions[i] = (ds.transpose(1, 2) @ wide_words + alpha.transpose(1, 2) @ dcontext).sum(0)
    return dregions.to(regions.dtype), dwords.to(words.dtype)


def formula_vjp(dscores, regions, words, lengths, *options) -> list[Tensor | None]:
    """The gradients as the formula's own, which can be differentiated again."""
    return vjp(lambda r, w: formula(r, w, lengths, *options), (regions, words), (dscores,))


class _Pictures:
    """The words of all texts, packed, and the [K, R] blocks that they make with one picture."""

    def __init__(self, regions, words, lengths, sharp, pool, word_softmax):
        self.valid = valid_words(words, lengths)
        self.words = words[self.valid]  # [K, D]
        self.starts = torch.nn.functional.pad(self.valid.sum(1).cumsum(0), (1, 0))
        self.rnorm = self.words.square().sum(1).clamp_min(EPS).rsqrt()
        K, R = len(self.words), regions.shape[1]
        self.s, self.alpha, self.h = self.words.new_empty(3, K, R).unbind()
        self.dots, self.square = self.words.new_empty(2, K).unbind()
        # h is alpha (r rᵀ) or (alpha r) rᵀ, the cheaper one; but of few regions the context may be
        # much shorter than they are, and alpha (r rᵀ) would lose its digits
        self.gram = 32 < regions.shape[1] <= regions.shape[2]
        self.inner = regions.new_empty(R, R) if self.gram else torch.empty_like(self.words)
        self.sharp, self.pool, self.word_softmax = sharp, pool, word_softmax
        self.sizes = (self.starts.data_ptr(), len(words), R)
        self.float64 = words.dtype == torch.float64

    def forward(self, picture: Tensor, scores: Tensor) -> None:
        """Writes scores [B_text], a column of the result, and the blocks s, alpha, h."""
        torch.mm(self.words, picture.T, out=self.s)
        _C.region_word_attention_cpu(
            *(self.float64, self.s.data_ptr(), self.alpha.data_ptr(), self.dots.data_ptr()),
            *(*self.sizes, self.sharp, self.word_softmax, threads()),
        )
        if self.gram:
            torch.mm(picture, picture.T, out=self.inner)
            torch.mm(self.alpha, self.inner, out=self.h)
        else:
            torch.mm(self.alpha, picture, out=self.inner)
            torch.mm(self.inner, picture.T, out=self.h)
        _C.region_word_pool_cpu(
            *(self.float64, self.alpha.data_ptr(), self.h.data_ptr(), self.dots.data_ptr()),
            *(self.rnorm.data_ptr(), self.square.data_ptr(), *self.sizes, self.pool),
            *(scores.data_ptr(), scores.stride(0), threads()),
        )

    def add_through_norm(self, picture: Tensor, dpicture: Tensor) -> None:
        """Adds to dpicture what h, as `backward` left it, gives: d|c|^2 with c = alpha r."""
        if self.gram:
            torch.mm(self.alpha.T, self.h, out=self.inner)
            dpicture.addmm_(self.inner, picture, alpha=2)
        else:
            dpicture.addmm_(self.h.T, self.inner, alpha=2)

    def backward(self, dscores: Tensor, radial: Tensor) -> None:
        """Turns s into ds and h into alpha d|c|^2; adds to radial [K]."""
        _C.region_word_bwd_cpu(
            *(self.float64, self.s.data_ptr(), self.alpha.data_ptr(), self.h.data_ptr()),
            *(self.dots.data_ptr(), self.rnorm.data_ptr(), self.square.data_ptr(), *self.sizes),
            *(self.sharp, self.pool, self.word_softmax, dscores.data_ptr(), dscores.stride(0)),
            *(radial.data_ptr(), threads()),
        )


def fwd(regions, words, lengths, *options) -> Tensor:
    regions, words = wide(regions, words)
    blocks = _Pictures(regions, words, lengths, *options)
    scores = words.new_empty(len(words), len(regions))
    for i, picture in enumerate(regions):
        blocks.forward(picture, scores[:, i])
    return scores


def bwd(dscores, regions, words, lengths, *options) -> tuple[Tensor, Tensor]:
    wide_regions, wide_words = wide(regions, words)
    blocks = _Pictures(wide_regions, wide_words, lengths, *options)
    radial, dpacked = torch.zeros_like(blocks.rnorm), torch.zeros_like(blocks.words)
    dregions, scores = torch.empty_like(wide_regions), dscores.new_empty(len(words))
    for i, picture in enumerate(wide_regions):
        blocks.forward(picture, scores)
        blocks.backward(dscores[:, i], radial)
        dpacked.addmm_(blocks.s, picture)
        torch.mm(blocks.s.T, blocks.words, out=dregions[i])
        blocks.add_through_norm(picture, dregions[i])
    dwords = torch.zeros_like(wide_words)
    dwords[blocks.valid] = dpacked.addcmul_(radial[:, None], blocks.words)
    return dregions.to(regions.dtype), dwords.to(words.dtype)
