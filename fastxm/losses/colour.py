"""Colours that agree from one size of a picture to another (StackGAN++, TPAMI 2018, eq. 6)."""

import torch.nn.functional as F
from torch import Tensor


def colours(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, 3] and covariance [B, 3, 3] of the pixels of pictures [B, 3, H, W]."""
    pixels = images.flatten(2).float()
    mean = pixels.mean(2)
    centred = pixels - mean[:, :, None]
    return mean, centred @ centred.mT / pixels.shape[2]


def colour_consistency(images: Tensor, others: Tensor) -> Tensor:
    """How far two batches of pictures differ in the means and covariances of their colours.

    Args:
        images: [B, 3, H, W], in [-1, 1] for the published weight.
        others: [B, 3, h, w], of any size.

    Returns:
        scalar, float32: MSE of the means plus 5 times MSE of the covariances.
    """
    (mean, covariance), (mean2, covariance2) = colours(images), colours(others)
    return F.mse_loss(mean, mean2) + 5 * F.mse_loss(covariance, covariance2)
