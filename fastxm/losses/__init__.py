"""What the players of each system minimise, as pure functions over the ops.

Modules where users expect them: `ClipLoss` and `SigLipLoss` as in open_clip, `NTXentLoss`; and
`cached_step` for batches of which the encoders do not hold the activations.
"""

from fastxm.losses.adversarial import bce, hinge_d, hinge_g, kl_normal
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
    region_word_loss,
    siglip_loss,
)
from fastxm.losses.mmd import mmd_loss
from fastxm.losses.mmd_gan import mmd_gan, one_sided

__all__ = [
    "ClipLoss",
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
    "mmd_gan",
    "mmd_loss",
    "nce",
    "nt_xent",
    "one_sided",
    "region_word_loss",
    "siglip_loss",
]
