"""DAMSM: captions and pictures in one space, word by word with regions, and as wholes.

Captions are read by STEM; pictures by a frozen network, of which one map gives the regions and the
pooled features the whole, each by one linear layer. Its text half is MirrorGAN's STEM; whole, it
tells how well a picture fits its caption (R-precision).
(Xu et al. AttnGAN, CVPR 2018, section 3.2.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.encoders.frozen import Looks
from fastxm.encoders.stem import STEM, STEMConfig
from fastxm.models.pretrained import Pretrained


@dataclass(frozen=True)
class DAMSMConfig:
    """What it is made of.

    Args:
        stem: of the text half.
        image_encoder: name or path for `fastxm.encoders.image_encoder`.
        image_encoder_size: side that pictures are resized to for it.
        region_width, image_width: channels of its last map but one, and of its pooled features.
        image_dropout: of both, in training (none in the published code).
    """

    stem: STEMConfig = field(default_factory=STEMConfig)
    image_encoder: str = "efficientnet-lite0"
    image_encoder_size: int = 224
    region_width: int = 112
    image_width: int = 1280
    image_dropout: float = 0.0


class DAMSM(Looks, Pretrained):
    """Captions and pictures as words, regions and wholes of width E.

    Args:
        config: with a vocabulary.
    """

    model_type: ClassVar[str] = "damsm"
    config_class: ClassVar[type[DAMSMConfig]] = DAMSMConfig

    def __init__(self, config: DAMSMConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = STEM(config.stem)
        self.dropout = nn.Dropout(config.image_dropout)
        self.region = nn.Linear(config.region_width, config.stem.width, bias=False)
        self.image = nn.Linear(config.image_width, config.stem.width)
        for layer in (self.region, self.image):
            nn.init.uniform_(layer.weight, -0.1, 0.1)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the frozen network sees, differentiable to the pictures.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Returns:
            regions [B, R, region_width] and whole [B, image_width].
        """
        maps = self.image_encoder.features(images)
        return maps[-2].flatten(2).transpose(1, 2), self.image_encoder.pool(maps)

    def project(self, regions: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """What `look` gave, in the common space: regions [B, R, E] and image [B, E]."""
        return self.region(self.dropout(regions)), self.image(self.dropout(whole))

    @torch.no_grad()
    def embed_images(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] as wholes: [B, E], rows of length 1."""
        parts = [
            self.image(self.look(part.to(self.device))[1]) for part in images.split(batch_size)
        ]
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions as wholes: [B, E], rows of length 1."""
        return F.normalize(self.stem(captions).sentence, dim=1)
