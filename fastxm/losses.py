"""What the players of each system minimise, as pure functions over the ops."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxm.ops import info_nce, mmd2, region_word_scores
from fastxm.ops.mmd import DEFAULT, Kernel


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss, mean relu(1 - real) + mean relu(1 + fake), in float32.

    Args:
        real: [N], logits of real pictures.
        fake: [M], logits of generated ones.
    """
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_g(fake: Tensor) -> Tensor:
    """The generator's hinge loss, -mean fake, in float32.

    Args:
        fake: [N], logits of generated pictures.
    """
    return -fake.float().mean()


def nce(a: Tensor, b: Tensor, *, temperature: float = 0.1) -> Tensor:
    """XMC-GAN's contrastive loss of paired rows: the sum of the two directions, of cosines.

    Args:
        a: [B, D].
        b: [B, D], row i the partner of a's row i.
        temperature: divides the cosines.

    Returns:
        scalar, float32.
    """
    return 2 * info_nce(a, b, 1 / temperature, normalize=True)


def region_word_loss(
    regions: Tensor,
    words: Tensor,
    lengths: Tensor,
    *,
    attention_sharpness: float = 5.0,
    pooling_sharpness: float = 5.0,
    score_scale: float = 50.0,
) -> Tensor:
    """XMC-GAN's word loss: text i and picture i belong together, the sum of the two directions.

    Args:
        regions: [B, R, D], region features of each picture; products are taken in their dtype.
        words: [B, T, D], word features of each text.
        lengths: [B], the number of words of each text.
        attention_sharpness: gamma_1, of the softmax over regions.
        pooling_sharpness: gamma_2, of the pooling over words.
        score_scale: gamma_3, of the scores as logits.

    Returns:
        scalar, float32.
    """
    scores = score_scale * region_word_scores(
        regions,
        words.to(regions.dtype),
        lengths,
        attention_sharpness=attention_sharpness,
        pooling_sharpness=pooling_sharpness,
    )
    target = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)


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
    # against the views swapped, row i meets its partner on the diagonal and itself B further on:
    # the shared label takes itself out
    labels = torch.arange(len(x), device=x.device).repeat(2)
    both, swapped = torch.cat([x, y]), torch.cat([y, x])
    return info_nce(both, swapped, 1 / temperature, symmetric=False, normalize=True, labels=labels)


def mmd_loss(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = DEFAULT,
    *,
    estimator: str = "biased",
    root: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    """How far two samples are apart: MMD^2, or the root that GMMN and MMD-GAN take of it.

    Args:
        x: [N, D].
        y: [M, D].
        kernel, estimator: as mmd2 takes them.
        root: sqrt(max(MMD^2, 0) + eps), whose gradient stays finite at 0.
        eps: in units of MMD^2.

    Returns:
        scalar, float32 (float64 for float64 inputs).
    """
    loss = mmd2(x, y, kernel, estimator=estimator)
    return (F.relu(loss) + eps).sqrt() if root else loss
