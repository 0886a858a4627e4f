"""Word modulation: the maps of attentional self-modulation, by attention over per-word tables.

    a[j, p] = softmax_j(sharpness cos(query[p], words[j])), over the words j < length
    (gamma, beta)[p] = sum_j a[j, p] word_gamma_beta[j] + global_gamma_beta

gamma and beta are linear in the context sum_j a[j, p] words[j], so the linear map is applied to
the T words instead of the h w contexts, and no [B, E, h, w] context exists. Both sums are products
of small matrices, so this is plain PyTorch on every device.
"""

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops.dispatch import no_autocast


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
        [B, T, h, w], float32 (float64 for float64); sums to 1 over T.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of several devices.
    """
    dispatch.one_device("word_attention", query, words, lengths)
    shapes = [list(t.shape) for t in (query, words, lengths)]
    if query.ndim != 4 or words.ndim != 3 or words.shape[::2] != query.shape[:2]:
        raise ValueError(f"attention needs query [B, E, h, w] and words [B, T, E], not {shapes}")
    if lengths.shape != words.shape[:1]:
        raise ValueError(f"attention needs lengths [B] beside words [B, T, E], not {shapes}")
    here = torch.arange(words.shape[1], device=words.device) < lengths[:, None]  # [B, T]
    with no_autocast(query):
        q, w = dispatch.wide(query.flatten(2), words)
        cosines = (w * _inverse_norm(w, 2)) @ q * _inverse_norm(q, 1)  # [B, T, h w]
        # a finite floor and then zero: a text without words gives zero, not NaN
        floor = torch.finfo(q.dtype).min
        logits = (sharpness * cosines).masked_fill(~here[:, :, None], floor)
        attention = logits.softmax(1) * here[:, :, None]
    return attention.unflatten(2, query.shape[2:])


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

    Several layers share one attention by tables set side by side along C: the halves become
    [gamma_1, gamma_2, ...] and [beta_1, beta_2, ...], and the maps are split along C after.

    Args:
        query: [B, E, h, w], NCHW or channels_last.
        words: [B, T, E]; rows are L2-normalised inside.
        lengths: [B], how many of the T words are there; with 0 only the global part remains.
        word_gamma_beta: [B, T, 2C], what each word gives, gamma in the first half and beta in the
            second. XMC-GAN's context is a sum of normalised words, so the table is a linear map
            of torch.nn.functional.normalize(words, dim=-1) there, not of words.
        global_gamma_beta: [B, 2C], what every location receives.
        sharpness: what multiplies the cosines.

    Returns:
        gamma, beta: [B, C, h, w] each, in word_gamma_beta's dtype (autocast's under autocast) and
        in the order of query: NCHW or channels_last.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of several devices.
    """
    dispatch.one_device("word_modulation", query, words, word_gamma_beta, global_gamma_beta)
    table, everywhere = word_gamma_beta, global_gamma_beta
    fits = table.ndim == 3 and table.shape[:2] == words.shape[:2] and table.shape[2] % 2 == 0
    if not fits or everywhere.shape != (table.shape[0], table.shape[2]):
        shapes = [list(t.shape) for t in (table, everywhere)]
        raise ValueError(f"word_modulation needs tables [B, T, 2C] and [B, 2C], not {shapes}")
    attention = word_attention(query, words, lengths, sharpness=sharpness)
    attention, everywhere = attention.flatten(2).to(table.dtype), everywhere.to(table.dtype)
    if query.stride(1) == 1:  # channels_last
        maps = torch.baddbmm(everywhere[:, None], attention.mT, table).mT
    else:
        maps = torch.baddbmm(everywhere[:, :, None], table.mT, attention)
    gamma, beta = maps.unflatten(2, query.shape[2:]).chunk(2, 1)
    return gamma, beta


def _inverse_norm(x: Tensor, dim: int) -> Tensor:
    # by the square: vector_norm has no second derivative at zero, where padding is
    return x.square().sum(dim, keepdim=True).clamp_min(1e-12).rsqrt()
