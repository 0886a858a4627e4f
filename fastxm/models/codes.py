"""What two frozen autoencoders make of a data set: codes of its pictures, and of its captions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastxm.data import CaptionedImages
from fastxm.data.image_features import image_features
from fastxm.data.subsets import captions_alone
from fastxm.models.image_autoencoder import ImageAutoencoder
from fastxm.models.text_autoencoder import TextAutoencoder
from fastxm.nn.stackgan import draw
from fastxm.ops import median_heuristic
from fastxm.ops.mmd import RBF


@dataclass(frozen=True)
class Codes:
    """Frozen codes of a data set: of its pictures, and of its captions without their pictures.

    mean, log_variance: [N, D], of the pictures' Gaussians. text: [M, E], of the captions, sorted.
    image_weight, text_weight: [N] and [M], how often each is drawn.
    """

    mean: Tensor
    log_variance: Tensor
    text: Tensor
    image_weight: np.ndarray
    text_weight: np.ndarray

    @classmethod
    @torch.no_grad()
    def of(
        cls, dataset: CaptionedImages, image: ImageAutoencoder, text: TextAutoencoder
    ) -> "Codes":
        """The codes of the pictures and of the captions of a data set."""
        features = image_features(dataset, image.image_encoder)
        mean, log_variance = image.encoder(features.to(image.device))
        captions, weight = captions_alone(dataset)
        return cls(mean, log_variance, text.embed(captions), dataset.weights, weight)

    def image(self, rows: Tensor) -> Tensor:
        """Codes of pictures drawn from their Gaussians, of rows [B]: [B, D]."""
        return draw(self.mean[rows], self.log_variance[rows])


def kernel_of(codes: Tensor) -> RBF:
    """The kernel that other codes are held against these [N, D] in, whatever their spread is.

    Gaussians of 1/4, 1/2, 1, 2 and 4 times the median distance of these codes.
    """
    median = median_heuristic(*codes.chunk(2)).item()
    return RBF([median * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)])
