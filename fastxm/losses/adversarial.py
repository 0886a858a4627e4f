"""What a discriminator and its generator minimise."""

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


def bce_real(logits: Tensor) -> Tensor:
    """Binary cross-entropy of logits that should say real, -mean log sigmoid, in float32.

    Args:
        logits: [N].
    """
    return F.softplus(-logits.float()).mean()


def bce_fake(logits: Tensor) -> Tensor:
    """Binary cross-entropy of logits that should say fake, -mean log(1 - sigmoid), in float32.

    Args:
        logits: [N].
    """
    return F.softplus(logits.float()).mean()
