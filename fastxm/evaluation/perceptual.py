"""How far two pictures are apart to a network that recognises things."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxm.encoders import EfficientNetLite0


@torch.no_grad()
def perceptual_distance(encoder: EfficientNetLite0, a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of EfficientNet-Lite0's features at each place, at unit length.

    The mean over places, then over five scales, as LPIPS (Zhang et al. 2018) before its weights are
    learned; it is no LPIPS, and the two are not to be compared.

    Args:
        encoder: gives the maps.
        a, b: [N, 3, H, W] in [0, 1].

    Returns:
        [N], in [0, 4].
    """
    distances = []
    for x, y in zip(a.split(16), b.split(16)):
        pairs = zip(encoder.features(x), encoder.features(y))
        scales = [
            (F.normalize(u, dim=1) - F.normalize(v, dim=1)).square().sum(1).mean((1, 2))
            for u, v in pairs
        ]
        distances.append(torch.stack(scales).mean(0))
    return torch.cat(distances) if distances else a.new_zeros(0)
