"""What a discriminator and its generator minimise."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def bce(logits: Tensor, real: bool, *, where: Tensor | None = None) -> Tensor:
    """Binary cross entropy of logits that are all of real or all of generated pictures, in float32.

    Args:
        logits: [N].
        real: what they should say.
        where: [N] booleans, those that count; all if not given. 0 if none does.
    """
    surprise = F.softplus(-logits.float() if real else logits.float())
    if where is None:
        return surprise.mean()
    return torch.where(where, surprise, 0).sum() / where.sum().clamp(min=1)


def kl_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """Divergence of normal distributions from the standard one: the mean over all [B, D].

    Args:
        mean, log_var: [B, D].
    """
    return -0.5 * (1 + log_var - mean.square() - log_var.exp()).mean()
