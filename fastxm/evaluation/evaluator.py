"""How good a generator's pictures are: distance to real ones, and whether captions find them.

The distance is "EffLite0-FD": the Frechet distance over pooled features of EfficientNet-Lite0,
from pictures resized to 224 px. It is no FID, and the two are not to be compared.
"""

import numpy as np
import torch
from torch import Tensor

from fastxm.data import CaptionedImages
from fastxm.data.image_features import image_features
from fastxm.encoders import EfficientNetLite0, image_encoder
from fastxm.evaluation.metrics import FeatureStatistics, frechet


def full_weight(dataset: CaptionedImages) -> CaptionedImages:
    """The pictures that are drawn most: of `emoji`, no skin-tone variants and no flags."""
    return dataset.select(np.flatnonzero(dataset.weights == dataset.weights.max()))


def shuffled(count: int, seed: int) -> Tensor:
    """The numbers below count, in an order that the seed fixes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class FrechetJudge:
    """EffLite0-FD of pictures against real ones of a data set, of full weight.

    Args:
        dataset: its pictures of full weight are shuffled; the first `num_images` are the real ones.
        encoder: of pictures; EfficientNet-Lite0 if not given.
        num_images: at most half of the pictures, so that the others can stand against them.
        seed: of the shuffle.

    Attributes:
        rows: of `dataset`, the real pictures; `other_rows`: as many others.
        real: statistics of the features of `rows`.
        baseline: the distance of `other_rows`, which a perfect generator would have.
    """

    def __init__(
        self,
        dataset: CaptionedImages,
        encoder: EfficientNetLite0 | None = None,
        *,
        num_images: int = 1500,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.dataset = full_weight(dataset)
        self.encoder = image_encoder() if encoder is None else encoder
        features = image_features(self.dataset, self.encoder, progress=progress)
        order = shuffled(len(features), seed)
        count = min(num_images, len(features) // 2)
        if count < 2:
            raise ValueError(f"a distance needs at least 4 pictures, not {len(features)}")
        self.rows, self.other_rows = order[:count], order[count : 2 * count]
        self.real = FeatureStatistics.of(features[self.rows])
        self.baseline = self.of_features(features[self.other_rows])

    def of_features(self, features: Tensor) -> float:
        """The distance of pictures with the features [N, 1280]."""
        return frechet(FeatureStatistics.of(features), self.real)

    def __call__(self, images: Tensor) -> float:
        """The distance of images [N, 3, H, W] in [0, 1]; N as large as `rows` compares best."""
        return self.of_features(self.encoder.embed(images))
