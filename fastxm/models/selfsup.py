"""Pictures of captions and captions of pictures, by maps between the codes of two autoencoders.

    picture = decode(TI(encode(caption)))        caption = decode(IT(encode(picture)))

An autoencoder of pictures and one of captions are trained apart and frozen; the maps IT and TI are
trained to give codes distributed as the other side's, without any pair of picture and caption.
(A. K. Das, S. Saha. Self-Supervised Image-to-Text and Text-to-Image Synthesis. ICONIP 2021,
arXiv:2112.04928.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastxm.models.image_autoencoder import ImageAutoencoder, ImageAutoencoderConfig
from fastxm.models.text_autoencoder import TextAutoencoder, TextAutoencoderConfig
from fastxm.models.text_to_image import TextToImage, evaluating
from fastxm.nn.mlp import Standardise, Unstandardise, mlp

Family = Literal["mmd_gan", "gan", "mmd"]
LAYERS = {"mmd_gan": (2, 2), "gan": (2, 5), "mmd": (2, 2)}  # hidden, to text and to images


@dataclass(frozen=True)
class CrossModalConfig:
    """What the networks are made of."""

    image: ImageAutoencoderConfig = field(default_factory=ImageAutoencoderConfig)
    text: TextAutoencoderConfig = field(default_factory=TextAutoencoderConfig)
    family: Family = "mmd_gan"
    """How the maps were trained: their depth follows the released code's."""
    hidden: int = 512
    """Width of the maps' hidden layers."""

    def __post_init__(self) -> None:
        if self.family not in LAYERS:
            raise ValueError(f"family is one of {', '.join(LAYERS)}, not {self.family!r}")
        if self.hidden < 1:
            raise ValueError(f"hidden is at least 1, not {self.hidden}")


class CrossModalAutoencoder(TextToImage):
    """Two autoencoders and the maps between their codes: `generate` draws, `caption` describes.

    Args:
        config: of all networks; it names the words of captions.
    """

    model_type: ClassVar[str] = "selfsup"
    config_class: ClassVar[type[CrossModalConfig]] = CrossModalConfig

    def __init__(self, config: CrossModalConfig) -> None:
        super().__init__()
        self.config = c = config
        self.image = ImageAutoencoder(c.image)
        self.text = TextAutoencoder(c.text)
        to_text, to_image = LAYERS[c.family]
        self.image_to_text = CodeMap(c.image.code, [c.hidden] * to_text, c.text.code)
        self.text_to_image = CodeMap(c.text.code, [c.hidden] * to_image, c.image.code)

    @property
    def generator(self) -> nn.Module:  # type: ignore[override]
        return self.image.decoder

    @property
    def image_size(self) -> int:
        return self.config.image.image_size

    @property
    def noise_width(self) -> int:
        return self.config.image.z_dim

    @property
    def text_encoder(self) -> Any:
        return self.text

    def attach(self, encoder: Any) -> None:
        """Takes over another model's autoencoder of captions, a copy of ours."""
        self.text.load_state_dict(encoder.state_dict())

    def encode(self, captions: list[str], batch_size: int) -> list[Tensor]:
        """The codes of pictures [B, D] that B captions are mapped to."""
        with torch.no_grad():
            return [self.text_to_image(self.text.embed(captions, batch_size=batch_size))]

    def picture(self, drawn: Any) -> Tensor:
        return drawn[-1]

    @torch.no_grad()
    def caption(self, images: Tensor, *, batch_size: int = 64) -> list[str]:
        """Describes pictures; the model stays as it was.

        Args:
            images: [N, 3, H, W] floats in [0, 1], N at least 1; or features [N, features] of the
                frozen image encoder.
            batch_size: captions at once.

        Returns:
            N texts, the likeliest word at each step. The code of a picture is its Gaussian's mean.

        Raises:
            TypeError: images are no tensor.
            ValueError: another shape, or no picture.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images are a tensor [N, 3, H, W], not {type(images).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, not {batch_size}")
        if len(images) == 0:
            raise ValueError("caption needs at least one picture")
        codes = self.image_to_text(self.image.embed(images))
        return self.text.say(codes, batch_size=batch_size)

    @torch.no_grad()
    def redraw(self, images: Tensor, *, seed: int = 0) -> Tensor:
        """The autoencoder's pictures [N, 3, S, S] of pictures as `caption` takes them."""
        code = self.image.embed(images)
        z = self.noise(1, 1, seed).expand(len(code), -1).to(code)
        with evaluating(self.generator):
            return self.generator(z, code)[-1].float().cpu()

    def reword(self, captions: Sequence[str]) -> list[str]:
        """The autoencoder's captions of captions."""
        return self.text.say(self.text.embed(captions))


class CodeMap(nn.Module):
    """Codes [B, source] to codes [B, target]; between them standard ones, once `fit` has seen some.

    Args:
        source, hidden, target: widths.
    """

    def __init__(self, source: int, hidden: Sequence[int], target: int) -> None:
        super().__init__()
        self.see = Standardise(source)
        self.network = mlp((source, *hidden, target))
        self.give = Unstandardise(target)

    def fit(self, source: Tensor, target: Tensor) -> None:
        """Takes mean and spread of codes of both sides, [N, source] and [M, target]."""
        self.see.fit(source)
        self.give.fit(target)

    def forward(self, codes: Tensor) -> Tensor:
        return self.give(self.network(self.see(codes)))
