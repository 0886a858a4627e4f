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
