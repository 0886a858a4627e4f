"""A picture and a caption in one space: two small heads on frozen encoders.

The image head stands on the pooled features of EfficientNet-Lite0, standardised; the text head on
the sentence of MiniLM, at unit length times the root of its width. The heads alone are trained and
saved (locked-image tuning of Zhai et al. 2022 with both towers locked); the loss is `info_nce`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm.encoders.frozen import Looks
from fastxm.models.pretrained import Pretrained


@dataclass(frozen=True)
class DualEncoderConfig:
    """What the heads are made of.

    Args:
        image_encoder, text_encoder: names or paths for `fastxm.encoders`.
        image_encoder_size: side of the pictures that the image encoder is given.
        image_width, text_width: of their features.
        words: word slots of a caption.
        hidden: width of each head's hidden layer.
        width: D, of the common space.
        image_dropout, text_dropout: of the heads, in training.
        logit_scale: logarithm of the inverse temperature at the start.
    """

    image_encoder: str = "efficientnet-lite0"
    text_encoder: str = "minilm"
    image_encoder_size: int = 224
    image_width: int = 1280
    text_width: int = 384
    words: int = 17
    hidden: int = 512
    width: int = 256
    image_dropout: float = 0.3
    text_dropout: float = 0.1
    logit_scale: float = 2.65


class DualEncoder(Looks, Pretrained):
    """Pictures and captions as vectors [D] whose cosine says how well they match.

    Args:
        config: of the heads.
    """

    model_type: ClassVar[str] = "dual-encoder"
    config_class: ClassVar[type[DualEncoderConfig]] = DualEncoderConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: DualEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DualEncoderConfig()
        self.register_buffer("mean", torch.zeros(c.image_width))
        self.register_buffer("std", torch.ones(c.image_width))
        self.image_head = nn.Sequential(
            nn.Dropout(c.image_dropout),
            nn.Linear(c.image_width, c.hidden),
            nn.GELU(),
            nn.Dropout(c.image_dropout),
            nn.Linear(c.hidden, c.width),
        )
        self.text_head = nn.Sequential(
            nn.Dropout(c.text_dropout),
            nn.Linear(c.text_width, c.hidden),
            nn.GELU(),
            nn.Linear(c.hidden, c.width),
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(c.logit_scale)))

    @property
    def text_encoder(self) -> Any:
        """The frozen encoder of captions, loaded when first asked for."""
        if "text" not in self._encoders:
            from fastxm.encoders import text_encoder

            options = {"max_length": self.config.words}
            self._encoders["text"] = text_encoder(self.config.text_encoder, **options)
        return self._encoders["text"].to(self.device)

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    @property
    def evidence_width(self) -> int:
        return self.config.image_width

    @property
    def temperature(self) -> float:
        """Of the softmax over cosines that was learnt."""
        return math.exp(-self.logit_scale.item())

    def evidence(self, features: Tensor) -> Tensor:
        """What the image head reads, [B, image_width]: the encoder's features, standardised."""
        return (features.to(self.device) - self.mean) / self.std

    def standardise(self, features: Tensor) -> None:
        """Takes mean and spread of the image features from features [N, image_width]."""
        self.mean.copy_(features.mean(0))
        # a channel that never fires in training would make any spark a blaze
        self.std.copy_(features.std(0).clamp(min=1e-3))

    def embed_images(self, images: Tensor) -> Tensor:
        """Pictures in the common space, differentiable to them.

        Args:
            images: [B, 3, H, W] in [0, 1], or features [B, image_width] of the image encoder.

        Returns:
            [B, D], rows of length 1.
        """
        features = self.image_encoder(images.to(self.device)) if images.ndim == 4 else images
        self.check(features, self.config.image_width, "images are [B, 3, H, W] or features")
        return F.normalize(self.image_head(self.evidence(features)), dim=1)

    def embed_text(self, text: Sequence[str] | Tensor) -> Tensor:
        """Captions in the common space.

        Args:
            text: B captions, or sentences [B, text_width] of the text encoder.

        Returns:
            [B, D], rows of length 1.
        """
        sentence = text if isinstance(text, Tensor) else self.text_encoder(text).sentence
        self.check(sentence, self.config.text_width, "text is captions or sentences")
        scaled = F.normalize(sentence.to(self.device), dim=1) * math.sqrt(self.config.text_width)
        return F.normalize(self.text_head(scaled), dim=1)

    def check(self, features: Tensor, width: int, contract: str) -> None:
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"{contract} [B, {width}], not {tuple(features.shape)}")

    def forward(
        self, images: Tensor, text: Sequence[str] | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, D] of both, and the inverse temperature: the arguments of `info_nce`."""
        return self.embed_images(images), self.embed_text(text), self.logit_scale.exp()
