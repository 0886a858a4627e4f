"""What keeps codes near a standard normal."""

from torch import Tensor


def kl_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of Gaussians from the standard normal, the mean over batch and dimensions.

    Args:
        mean, log_variance: [B, D], of diagonal Gaussians.

    Returns:
        scalar, float32: -1/2 mean(1 + log_variance - mean^2 - exp log_variance).
    """
    mean, log_variance = mean.float(), log_variance.float()
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()
