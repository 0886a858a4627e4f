"""What the players of each system minimise, as pure functions over the ops.

Modules where users expect them: `ClipLoss` and `SigLipLoss` as in open_clip, `NTXentLoss`,
`MMDLoss`; and `cached_step` for batches of which the encoders do not hold the activations.
"""

from fastxm.losses.adversarial import hinge_d, hinge_g
from fastxm.losses.cached import cached_step
from fastxm.losses.contrastive import (
    ClipLoss,
    NTXentLoss,
    SigLipLoss,
    clip_loss,
    damsm_loss,
    nce,
    nt_xent,
    region_word_loss,
    siglip_loss,
)
from fastxm.losses.mmd import MMDLoss, mmd_gan_d, mmd_gan_g, mmd_loss

__all__ = [
    "ClipLoss",
    "MMDLoss",
    "NTXentLoss",
    "SigLipLoss",
    "cached_step",
    "clip_loss",
    "damsm_loss",
    "hinge_d",
    "hinge_g",
    "mmd_gan_d",
    "mmd_gan_g",
    "mmd_loss",
    "nce",
    "nt_xent",
    "region_word_loss",
    "siglip_loss",
]
