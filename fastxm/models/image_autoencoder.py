"""Pictures as vectors, and back: a frozen network's features, a Gaussian code, StackGAN's stages.

    h = tanh(W features)        mu, log var = GLU(V h)        c = mu + eps exp(log var / 2)
    pictures of 64, 128, 256 px = stages(c, z),  z standard normal

(H. Zhang et al., StackGAN++, TPAMI 2018; as the image autoencoder of Das & Saha, arXiv:2112.04928,
whose features are a ResNet-50's.)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastxm.encoders.frozen import Looks
from fastxm.models.pretrained import Pretrained
from fastxm.nn.mlp import Standardise
from fastxm.nn.outputs import to_picture
from fastxm.nn.stackgan import (
    ConditioningAugmentation,
    FirstStage,
    GatedResidual,
    conv3x3,
    draw,
    gated,
    gated_up,
    orthogonal_,
    tiled,
)

SIZES = (64, 128, 256)


@dataclass(frozen=True)
class ImageAutoencoderConfig:
    """What the networks are made of."""

    image_size: int = 256
    """Side of the last stage's pictures: 64, 128 or 256, one stage, two or three."""
    image_encoder: str = "efficientnet-lite0"
    """Frozen features of pictures: a name for `fastxm.encoders.image_encoder`."""
    features: int = 1280
    """Width of those features (2048 of a ResNet-50)."""
    hidden: int = 1024
    """Width of the layer between features and code."""
    code: int = 128
    """Width of a picture's code."""
    z_dim: int = 100
    """Width of the noise."""
    gf: int = 64
    """Base channels of the decoder."""
    residuals: int = 2
    """Residual blocks in each stage but the first."""

    def __post_init__(self) -> None:
        if self.image_size not in SIZES:
            raise ValueError(f"image_size is one of {SIZES}, not {self.image_size}")
        for name in ("features", "hidden", "code", "z_dim", "gf"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.gf >> self.stages - 1 < 1:
            raise ValueError(f"gf is at least {1 << self.stages - 1} for {self.stages} stages")
        if self.residuals < 0:
            raise ValueError(f"residuals is at least 0, not {self.residuals}")

    @property
    def stages(self) -> int:
        return SIZES.index(self.image_size) + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures of each stage."""
        return SIZES[: self.stages]


class ImageEncoder(nn.Module):
    """Frozen features [B, features] to mean and log variance of codes, [B, code] each."""

    def __init__(self, config: ImageAutoencoderConfig) -> None:
        super().__init__()
        self.standardise = Standardise(config.features)
        self.linear = nn.Linear(config.features, config.hidden)
        self.augment = ConditioningAugmentation(config.hidden, config.code)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.augment(torch.tanh(self.linear(self.standardise(features))))


class NextStage(nn.Module):
    """A map and the code to a map of twice the side and half the channels."""

    def __init__(self, channels: int, code: int, residuals: int) -> None:
        super().__init__()
        self.join = gated(channels + code, channels)
        self.residuals = nn.Sequential(*(GatedResidual(channels) for _ in range(residuals)))
        self.up = gated_up(channels, channels // 2)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """[B, C, H, W] and [B, code] -> [B, C / 2, 2 H, 2 W]."""
        return self.up(self.residuals(self.join(torch.cat([tiled(code, x), x], 1))))


class ImageDecoder(nn.Module):
    """Codes and noise to pictures, of every stage.

    Args:
        config: of the whole autoencoder.
    """

    def __init__(self, config: ImageAutoencoderConfig) -> None:
        super().__init__()
        widths = [config.gf >> i for i in range(config.stages)]
        self.first = FirstStage(config.code + config.z_dim, widths[0])
        self.stages = nn.ModuleList(
            NextStage(width, config.code, config.residuals) for width in widths[:-1]
        )
        self.to_rgb = nn.ModuleList(conv3x3(width, 3) for width in widths)
        orthogonal_(self)

    def forward(self, z: Tensor, code: Tensor) -> list[Tensor]:
        """Pictures [B, 3, S, S] in [0, 1], at least float32, S of each stage in turn.

        Args:
            z: [B, z_dim], standard normal.
            code: [B, code].
        """
        x = self.first(torch.cat([code, z], 1))
        maps = [x]
        for stage in self.stages:
            x = stage(x, code)
            maps.append(x)
        return [to_picture(rgb(x)) for rgb, x in zip(self.to_rgb, maps)]


class ImageAutoencoder(Looks, Pretrained):
    """Pictures to codes and codes to pictures.

    Args:
        config: of both networks.
    """

    model_type: ClassVar[str] = "image-autoencoder"
    config_class: ClassVar[type[ImageAutoencoderConfig]] = ImageAutoencoderConfig

    def __init__(self, config: ImageAutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or ImageAutoencoderConfig()
        self.encoder = ImageEncoder(self.config)
        self.decoder = ImageDecoder(self.config)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Codes [N, code] of pictures: the means of their Gaussians.

        Args:
            images: [N, 3, H, W] floats in [0, 1], or features [N, features] of the frozen encoder.
        """
        width = self.config.features
        features = images
        if images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point():
            features = self.image_encoder.embed(images.to(self.device))
        if features.ndim != 2 or features.shape[1] != width or not features.is_floating_point():
            raise ValueError(
                f"images are floats [N, 3, H, W] in [0, 1] or features [N, {width}], "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        return self.encoder(features.to(self.device))[0]

    def forward(self, features: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """A picture of each of the features [B, features], from codes and noise drawn here.

        Returns:
            the pictures of each stage; mean and log variance of the codes, [B, code].
        """
        mean, log_variance = self.encoder(features)
        z = torch.randn(len(mean), self.config.z_dim, device=mean.device)
        return self.decoder(z, draw(mean, log_variance)), mean, log_variance
