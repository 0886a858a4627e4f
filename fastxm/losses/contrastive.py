"""Pairs that are to find each other: rows with rows, regions with words; and modules of these."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.ops import info_nce, region_word_scores
from fastxm.ops.distributed import all_rows, gather_rows, row_counts
from fastxm.ops.info_nce_views import info_nce_views
from fastxm.ops.siglip import siglip


def nce(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float = 0.1,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """XMC-GAN's contrastive loss of paired rows: the sum of the two directions, of cosines.

    Args:
        a: [B, D].
        b: [B, D], row i the partner of a's row i.
        temperature: divides the cosines.
        group: whose ranks each give their pairs; as of `info_nce`.

    Returns:
        scalar, float32.
    """
    return 2 * info_nce(a, b, 1 / temperature, normalize=True, group=group)


def pseudo_text_loss(
    images: Tensor,
    text: Tensor,
    *,
    temperature: float = 0.5,
    text_share: float = 0.0,
    sharpened: bool = False,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """LAFITE's contrastive loss of paired rows: telling a text's picture, or the reverse.

    Args:
        images: [B, D], features of pictures.
        text: [B, D], row i the (pseudo) text of picture i.
        temperature: divides the cosines.
        text_share: in [0, 1], weight of telling a picture's text; the rest tells a text's picture.
        sharpened: take exp(cosine / temperature) for the logits, as the released code does, where
            InfoNCE takes cosine / temperature.
        group: whose ranks each give their pairs; as of `info_nce`. Sharpened, each rank gathers the
            rows of all and has the whole loss.

    Returns:
        scalar, float32.

    Source: Zhou et al. 2022; `sharpened` and `text_share` of the released code, in which
    log(temperature) is subtracted.
    """
    if not 0 <= text_share <= 1:
        raise ValueError(f"text_share is in [0, 1], not {text_share}")
    if sharpened:
        images, text = (all_rows(t, group) for t in (images, text))
        cosines = F.normalize(images.float(), dim=1) @ F.normalize(text.float(), dim=1).T
        logits = (cosines / temperature).exp()
        target = torch.arange(logits.shape[0], device=logits.device)
        parts = [lambda: F.cross_entropy(logits.T, target), lambda: F.cross_entropy(logits, target)]
    else:
        options: dict[str, Any] = {"normalize": True, "symmetric": False, "group": group}
        parts = [
            lambda: info_nce(text, images, 1 / temperature, **options),
            lambda: info_nce(images, text, 1 / temperature, **options),
        ]
    shares = (1 - text_share, text_share)
    return sum(
        (share * part() for share, part in zip(shares, parts) if share), images.new_zeros(())
    )


def region_word_loss(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    *,
    attention_sharpness: float = 5.0,
    pooling_sharpness: float = 5.0,
    score_scale: float = 50.0,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """XMC-GAN's word loss: text i and picture i belong together, the sum of the two directions.

    Args:
        regions: [B, R, D], region features of each picture; products are taken in their dtype.
        words: [B, T, D], word features of each text.
        lengths: [B], the number of words of each text.
        attention_sharpness: gamma_1, of the softmax over regions.
        pooling_sharpness: gamma_2, of the pooling over words.
        score_scale: gamma_3, of the scores as logits.
        group: a torch.distributed group: each rank gives its own pictures and texts, of any number,
            and scores the texts of all against its pictures. Each has the whole loss; the average
            over ranks of their gradients, DistributedDataParallel's, is the whole gradient.

    Returns:
        scalar, float32.
    """
    scores = score_scale * scores_of_all(
        regions,
        words,
        lengths,
        group,
        attention_sharpness=attention_sharpness,
        pooling_sharpness=pooling_sharpness,
    )
    return both_ways(scores)


def damsm_loss(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    image: Tensor,
    sentence: Tensor,
    *,
    labels: Tensor | None = None,
    attention_sharpness: float = 4.0,
    pooling_sharpness: float = 5.0,
    score_scale: float = 10.0,
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """AttnGAN's deep attentional multimodal similarity: word by word, and as a whole.

    Args:
        regions: [B, R, D], region features of each picture; products are taken in their dtype.
        words: [B, T, D], word features of each text.
        lengths: [B], the number of words of each text.
        image: [B, E], features of each picture as a whole.
        sentence: [B, E], of each text as a whole.
        labels: [B] integers, classes: other pairs of one class are no negatives.
        attention_sharpness: gamma_1, of the softmax over regions.
        pooling_sharpness: gamma_2, of the pooling over words. As in the released code, and not in
            the paper's eq. 10, what is pooled is not divided by it.
        score_scale: gamma_3, of both scores as logits.
        group: a torch.distributed group, whose ranks each give their own pictures, texts and
            labels: the word loss is then as `region_word_loss` gives it, the sentence loss as
            `info_nce` does. Averages over ranks are the whole losses and their gradients.

    Returns:
        the word loss and the sentence loss, scalars of float32: each the sum of both directions.

    Source: Xu et al. 2018, eqs. 7 to 14.
    """
    scores = (score_scale * pooling_sharpness) * scores_of_all(
        regions,
        words,
        lengths,
        group,
        attention_sharpness=attention_sharpness,
        pooling_sharpness=pooling_sharpness,
        word_softmax=True,
    )
    if labels is not None:
        classes = labels
        if group is not None:
            classes = gather_rows(labels, row_counts(len(labels), labels.device, group), group)
        others = ~torch.eye(len(classes), dtype=torch.bool, device=labels.device)
        scores = scores.masked_fill((classes[:, None] == classes) & others, -torch.inf)
    options: dict[str, Any] = {"normalize": True, "labels": labels, "group": group}
    return both_ways(scores), 2 * info_nce(image, sentence, score_scale, **options)


def scores_of_all(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    group: "dist.ProcessGroup | None",
    **options: Any,
) -> Tensor:
    """Region-word scores of the texts and pictures of all ranks, of which each scores its pictures.

    Args:
        regions, words, lengths: as of `region_word_scores`; words are rounded to regions' dtype.
        group: the ranks; None is this process alone.
        options: as of `region_word_scores`.
    """
    words = words.to(regions.dtype)
    if group is None:
        return region_word_scores(regions, words, lengths, **options)
    counts = row_counts(words.shape[0], words.device, group)
    words, lengths = (gather_rows(t, counts, group) for t in (words, lengths))
    return gather_rows(region_word_scores(regions, words, lengths, **options).T, counts, group).T


def both_ways(logits: Tensor) -> Tensor:
    """Cross entropy of telling row i's partner, column i, plus that of column i's, row i."""
    target = torch.arange(logits.shape[0], device=logits.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
    """CLIP's loss of features that are normalised already; called as open_clip's ClipLoss is.

    Args:
        image_features: [B, D].
        text_features: [B, D].
        logit_scale: the inverse temperature, after its exponential.

    Returns:
        scalar, float32: the average of the two directions.
    """
    return info_nce(image_features, text_features, logit_scale)


def nt_xent(x: Tensor, y: Tensor, *, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss of two views: each of the 2B rows tells its partner from the other 2B - 2.

    Args:
        x: [B, D], one view.
        y: [B, D], the other view of the same samples.
        temperature: divides the cosines.

    Returns:
        scalar, float32.
    """
    return info_nce_views(x, y, 1 / temperature).mean()


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
) -> Tensor:
    """SigLIP's loss of features that are normalised already: each pair is told to match or not.

    Args:
        image_features: [B, D].
        text_features: [B, D].
        logit_scale: the inverse temperature, after its exponential.
        logit_bias: added to the logits.

    Returns:
        scalar, float32: the sum over pairs divided by B.
    """
    return siglip(image_features, text_features, logit_scale, logit_bias)


class ClipLoss(nn.Module):
    """CLIP's loss, called and constructed as open_clip's ClipLoss.

    Across ranks (world_size > 1, the default process group) no features are gathered, and the
    gradient is that of the whole batch once DistributedDataParallel has averaged it, as open_clip's
    with gather_with_grad=True (without it, part of the gradient is lost there). Ranks may hold
    different numbers of pairs.

    Args:
        local_loss: only the value depends on it across ranks: the share of this rank's pairs (their
            mean where all ranks hold as many), else the mean over the whole batch.
        gather_with_grad, cache_labels, rank: taken for compatibility; nothing depends on them.
        world_size: ranks of the default process group, or 1.
        use_horovod: must be False.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss runs across ranks of torch.distributed, not of Horovod")
        self.local_loss, self.world_size = local_loss, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [B, D], scalar, or {"contrastive_loss": it} for output_dict."""
        group = _world(self.world_size)
        loss = info_nce(image_features, text_features, logit_scale, group=group)
        if group is not None and not self.local_loss:
            whole = loss.detach().clone()
            dist.all_reduce(whole, group=group)
            loss = loss + (whole / self.world_size - loss.detach())
        if logit_bias is not None:
            # adds the same to all logits, and nothing to the loss: its gradient is 0, not missing
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """SigLIP's loss, called and constructed as open_clip's SigLipLoss.

    Across ranks (world_size > 1, the default process group) the text features go round a ring; the
    value is the share of this rank's images (their mean where all ranks hold as many), as there.

    Args:
        cache_labels, rank, dist_impl: taken for compatibility; nothing depends on them.
        world_size: ranks of the default process group, or 1.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ):
        super().__init__()
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [B, D], scalar, or {"contrastive_loss": it} for output_dict."""
        bias = 0.0 if logit_bias is None else logit_bias
        group = _world(self.world_size)
        loss = siglip(image_features, text_features, logit_scale, bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss


class NTXentLoss(nn.Module):
    """SimCLR's loss of two views [B, D] of the same samples: `nt_xent` at one temperature."""

    def __init__(self, temperature: float = 0.5):
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nt_xent(x, y, temperature=self.temperature)


def _world(size: int) -> "dist.ProcessGroup | None":
    """The default process group, or None for one rank alone."""
    if size == 1:
        return None
    if not dist.is_initialized() or dist.get_world_size() != size:
        raise ValueError(f"world_size={size} needs a default process group of {size} ranks")
    return dist.group.WORLD
