"""Word modulation: the maps of attentional self-modulation, by attention over per-word tables.

    a[j, p] = softmax_j(sharpness cos(query[p], words[j])), over the words j < length
    (gamma, beta)[p] = sum_j a[j, p] word_gamma_beta[j] + global_gamma_beta

gamma and beta are linear in the context sum_j a[j, p] words[j], so the linear map is applied to
the T words instead of the h w contexts, and no [B, E, h, w] context exists.
"""

import torch
from torch import Tensor

from fastxm.ops import dispatch


def word_attention(
    query: Tensor, words: Tensor, lengths: Tensor, *, sharpness: float = 15.0
) -> Tensor:
    """How much each location attends to each word.

    Args:
        query: [B, E, h, w], NCHW or channels_last.
        words: [B, T, E].
        lengths: [B], how many of the T words are there; with 0 the attention is zero.
        sharpness: what multiplies the cosines.

    Returns:
        [B, T, h, w], float32 (float64 for float64): over T it sums to 1.

    Raises:
        ValueError: shapes that do not fit.
    """
    B, E = query.shape[:2]
    if query.ndim != 4 or words.ndim != 3 or words.shape[::2] != (B, E) or lengths.shape != (B,):
        raise ValueError("attention needs query [B, E, h, w], words [B, T, E] and lengths [B], not "
                         f"{list(query.shape)}, {list(words.shape)} and {list(lengths.shape)}")  # fmt: skip
    valid = torch.arange(words.shape[1], device=words.device) < lengths.view(-1, 1)  # [B, T]
    with torch.autocast(query.device.type, enabled=False):
        q, w = dispatch.wide(query.flatten(2), words)
        cosines = (w * _inverse_norm(w, 2)) @ q * _inverse_norm(q, 1)  # [B, T, h w]
        # a finite floor, then zero: a sample without words gives zero, not NaN
        masked = (sharpness * cosines).masked_fill(~valid[:, :, None], torch.finfo(q.dtype).min)
        attention = masked.softmax(1) * valid[:, :, None]
    return attention.unflatten(2, query.shape[2:])


def _inverse_norm(x: Tensor, dim: int) -> Tensor:
    return x.square().sum(dim, keepdim=True).clamp_min(1e-12).rsqrt()


def word_modulation(
    query: Tensor,
    words: Tensor,
    lengths: Tensor,
    word_gamma_beta: Tensor,
    global_gamma_beta: Tensor,
    *,
    sharpness: float = 15.0,
) -> tuple[Tensor, Tensor]:
    """The gamma and beta maps of attentional self-modulation (Zhang et al. 2021, XMC-GAN).

    Args:
        query: [B, E, h, w], NCHW or channels_last.
        words: [B, T, E]; rows are L2-normalised inside.
        lengths: [B], how many of the T words are there; with 0 only the global part remains.
        word_gamma_beta: [B, T, 2C], what each word adds: gamma in the first half, beta in the second. XMC-GAN's
            context sums normalised words, so this is normalize(words) @ weight.T there. Several
            layers share one attention by tables set side by side along the last axis:
            [gamma_1, gamma_2, ..., beta_1, beta_2, ...], the results split along C.
        global_gamma_beta: [B, 2C], what every location receives.
        sharpness: what multiplies the cosines.

    Returns:
        gamma, beta: [B, C, h, w] each, in word_gamma_beta's dtype, in query's memory format.

    Raises:
        ValueError: shapes that do not fit.
    """
    B, T, C2 = word_gamma_beta.shape
    if (B, T) != words.shape[:2] or global_gamma_beta.shape != (B, C2) or C2 % 2:
        raise ValueError("word_modulation needs word_gamma_beta [B, T, 2C] and global_gamma_beta "
                         f"[B, 2C], not {list(word_gamma_beta.shape)} and {list(global_gamma_beta.shape)}")  # fmt: skip
    attention = word_attention(query, words, lengths, sharpness=sharpness).flatten(2)  # [B, T, h w]
    attention = attention.to(word_gamma_beta.dtype)
    if query.is_contiguous(memory_format=torch.channels_last):
        maps = torch.baddbmm(global_gamma_beta[:, None], attention.mT, word_gamma_beta).mT
    else:
        maps = torch.baddbmm(global_gamma_beta[:, :, None], word_gamma_beta.mT, attention)
    gamma, beta = maps.unflatten(2, query.shape[2:]).chunk(2, 1)
    return gamma, beta
