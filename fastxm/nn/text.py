"""Text features as networks take them."""

import math

from torch import Tensor
from torch.nn import functional as F

SCALES = ("raw", "unit")


def scaled(text: Tensor, scale: str) -> Tensor:
    """Features [..., E] as they are ("raw"), or with a mean square of 1 ("unit"); zeros stay zeros.

    Beside noise of variance 1, features that are much smaller are not seen for many steps.
    """
    return text if scale == "raw" else F.normalize(text, dim=-1) * math.sqrt(text.shape[-1])
