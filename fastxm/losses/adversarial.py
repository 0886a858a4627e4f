"""What a discriminator and its generator minimise."""

import math

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


def bce(
    logits: Tensor, real: bool, *, where: Tensor | None = None, count: float | Tensor | None = None
) -> Tensor:
    """Binary cross entropy of logits that are all of real or all of generated pictures, in float32.

    Args:
        logits: [N].
        real: what they should say.
        where: [N] booleans, those that count; all if not given. 0 if none does.
        count: what the sum of those that count is divided by; how many there are if not given.
    """
    surprise = F.softplus(-logits.float() if real else logits.float())
    if where is None:
        return surprise.mean()
    count = where.sum().clamp(min=1) if count is None else count
    return torch.where(where, surprise, 0).sum() / count


def kl_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """Divergence of normal distributions from the standard one: the mean over all [B, D].

    Args:
        mean, log_var: [B, D].
    """
    return -0.5 * (1 + log_var - mean.square() - log_var.exp()).mean()


def logistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's logistic loss, mean softplus(-real) + mean softplus(fake), in float32.

    Args:
        real: [N], logits of real pictures.
        fake: [M], logits of generated ones.
    """
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def logistic_g(fake: Tensor) -> Tensor:
    """The generator's non-saturating loss, mean softplus(-fake), in float32.

    Args:
        fake: [N], logits of generated pictures.
    """
    return F.softplus(-fake.float()).mean()


def r1(logits: Tensor, images: Tensor) -> Tensor:
    """Half the squared gradient of the logits at real pictures, the mean over them.

    Args:
        logits: [N], of the images.
        images: [N, 3, H, W], which require a gradient.

    Source: Mescheder et al. 2018, eq. 9; times gamma.
    """
    (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean() / 2


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """How far pictures move in the direction of a noise image when their w moves.

    Args:
        images: [N, 3, H, W], generated from ws.
        ws: [N, L, W], rows of w, which require a gradient.
        noise: [N, 3, H, W], standard normal.

    Returns:
        [N], differentiable to the weights.

    Source: Karras et al. 2020, eq. 4.
    """
    along = (images * noise).sum() / math.sqrt(images.shape[2] * images.shape[3])
    (slope,) = torch.autograd.grad(along, ws, create_graph=True)
    return slope.square().sum(2).mean(1).sqrt()
