"""What the players of each system minimise, as pure functions over the ops.

Modules where users expect them: `ClipLoss` and `SigLipLoss` as in open_clip, `NTXentLoss`,
`MMDLoss`; and `cached_step` for batches of which the encoders do not hold the activations.
"""

from fastxm.losses.adversarial import (
    bce,
    hinge_d,
    hinge_g,
    kl_normal,
    logistic_d,
    logistic_g,
    path_lengths,
    r1,
)
from fastxm.losses.cached import cached_step
from fastxm.losses.colour import colour_consistency
from fastxm.losses.contrastive import (
    ClipLoss,
    NTXentLoss,
    SigLipLoss,
    clip_loss,
    damsm_loss,
    nce,
    nt_xent,
    pseudo_text_loss,
    region_word_loss,
    siglip_loss,
)
from fastxm.losses.mmd import MMDLoss, mmd_gan_d, mmd_gan_g, mmd_loss

__all__ = [
    "ClipLoss",
    "MMDLoss",
    "NTXentLoss",
    "SigLipLoss",
    "bce",
    "cached_step",
    "clip_loss",
    "colour_consistency",
    "damsm_loss",
    "hinge_d",
    "hinge_g",
    "kl_normal",
    "logistic_d",
    "logistic_g",
    "mmd_gan_d",
    "mmd_gan_g",
    "mmd_loss",
    "nce",
    "nt_xent",
    "path_lengths",
    "pseudo_text_loss",
    "r1",
    "region_word_loss",
    "siglip_loss",
]
