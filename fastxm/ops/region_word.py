"""Region-word scores: how well every text fits every picture, word by word.

For text t, word j < lengths[t], picture i, region r (rows L2-normalised unless word_softmax):

    s[r]  = <region[i, r], word[t, j]>
    alpha = softmax_r(sharp s), or softmax_r(sharp softmax_j(s)) if word_softmax
    m[j]  = cos(word[t, j], sum_r alpha[r] region[i, r])
    S[t, i] = log sum_j exp(pool m[j]) / pool

Backward, for the rows r of a picture and a word w, with the context c = alpha r, beta what stands
in the softmax over regions, h = c rᵀ = alpha (r rᵀ), and v = dS exp(pool (m - S)):

    d<w, c>  = v / (|w| |c|)      d|c|^2 = -v m / (2 |c|^2)      f = d<w, c> s + 2 d|c|^2 h
    dbeta    = sharp alpha (f - sum_r alpha f)
    ds       = d<w, c> alpha + dbeta, or + beta (dbeta - sum_j beta dbeta) if word_softmax
    dr = sum_tj dsᵀ w + 2 d|c|^2 alphaᵀ c        dw = sum_i ds r - v m w / |w|^2
"""

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops import region_word_products as products
from fastxm.ops.region_word_op import scores
from fastxm.ops.region_word_reference import valid_words


def region_word_scores(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    *,
    attention_sharpness: float = 5.0,
    pooling_sharpness: float = 5.0,
    word_softmax: bool = False,
) -> Tensor:
    """Scores of all pairs of a text and a picture by attention of words over regions.

    Args:
        regions: [B_image, R, D], of any floating dtype.
        words: [B_text, T, D].
        lengths: [B_text], integers 0 to T; words from there on are padding: they neither count nor
            get a gradient, whatever they hold. A text without words scores -inf.
        attention_sharpness: factor inside the softmax over regions (XMC-GAN rho_1, DAMSM gamma_1).
        pooling_sharpness: factor inside the pooling of words (rho_2, gamma_2).
        word_softmax: the DAMSM form: dot products of the rows as they are, and a softmax over the
            words of the text before that over the regions.

    Returns:
        [B_text, B_image], float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit together.
        TypeError: regions or words are not floating, or the tensors are of several devices.

    Source: Zhang et al. 2021 (XMC-GAN), sec. 3; Xu et al. 2018 (AttnGAN), eqs. 7-10.
    """
    dispatch.one_device("region_word_scores", regions, words, lengths)
    if regions.ndim != 3 or words.ndim != 3 or regions.shape[2] != words.shape[2]:
        raise ValueError(
            f"region_word_scores needs regions [B_image, R, D] and words [B_text, T, D], "
            f"not {regions.shape} and {words.shape}"
        )
    if not regions.is_floating_point() or not words.is_floating_point():
        raise TypeError(f"regions and words are floating, not {regions.dtype} and {words.dtype}")
    counts = not (lengths.is_floating_point() or lengths.dtype == torch.bool)
    if lengths.shape != words.shape[:1] or not counts:
        raise ValueError(
            f"lengths are integers [{words.shape[0]}], not {lengths.dtype} {lengths.shape}"
        )
    if regions.shape[1] == 0 or words.shape[1] == 0:
        raise ValueError("region_word_scores needs at least one region and one word")
    words = words.masked_fill(~valid_words(words, lengths)[..., None], 0)
    if not word_softmax:
        words = dispatch.unit_rows(words).to(products.dtype_of(regions, words))
    options = (float(attention_sharpness), float(pooling_sharpness), word_softmax)
    keep = torch.is_grad_enabled() and (regions.requires_grad or words.requires_grad)
    return scores(regions, words, lengths, *options, keep)[0]
