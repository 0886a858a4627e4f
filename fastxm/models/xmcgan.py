"""XMC-GAN: one-stage text-to-image generation by cross-modal contrastive learning.

The generator turns noise and a sentence into a 16 x 16 map, lets every location attend to the
words, and modulates all later layers with what it attended to. The discriminator scores pictures
against sentences, and gives the picture and region features of the contrastive losses.

Channels are BigGAN's, whose 128 and 256 px tables are XMC-GAN's; so 64 px takes BigGAN's own:

    S     generator (x gf), from 8 x 8 up    discriminator (x df), from S / 2 down
    64    16 8 4 2                           1 2 4 8 16        regions: 2 df
    128   16 8 4 2 1                         1 2 4 8 16 16     regions: 4 df
    256   16 8 8 4 2 1                       1 2 4 8 8 16 16   regions: 8 df at 16 x 16

(H. Zhang, J. Y. Koh, J. Baldridge, H. Lee, Y. Yang. Cross-Modal Contrastive Learning for
Text-to-Image Generation. CVPR 2021.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.models.text_to_image import TextToImage
from fastxm.nn import (
    AttentionalModulation,
    ConditionalModulation,
    DownBlock,
    FirstDownBlock,
    ModulatedNorm,
    SpectralConv2d,
    SpectralLinear,
    UpBlock,
    normalised_once,
)
from fastxm.nn.blocks import Condition, Conv2d
from fastxm.nn.init import glorot_normal_
from fastxm.nn.outputs import at_least_float, to_picture

UP = {64: (16, 8, 4, 2), 128: (16, 8, 4, 2, 1), 256: (16, 8, 8, 4, 2, 1)}
DOWN = {64: (1, 2, 4, 8, 16), 128: (1, 2, 4, 8, 16, 16), 256: (1, 2, 4, 8, 8, 16, 16)}
GLOBAL_BLOCKS = 2  # 4 -> 8 -> 16, before any word is seen


@dataclass(frozen=True)
class XMCGANConfig:
    """What the networks are made of.

    Args:
        image_size: 64, 128 or 256 pixels a side.
        gf, df: base channels of generator and discriminator.
        z_dim: width of the noise.
        cond_dim: width of the projected sentence.
        text_encoder: name or path for `fastxm.encoders.text_encoder`; the paper's is BERT base.
        text_width: E, width of that encoder's features (768 for BERT base).
        words: T, word slots of a caption.
        sentence: the sentence vector, "masked_mean" of the words or "reference", which counts what
            the encoder makes of padding too (the released code).
        attention: "shared" attends once, at 16 x 16, for all layers (the released code);
            "per_layer" lets every layer attend from its own features (the paper's figure 2), at
            the cost of an E-channel query map at every size.
        attention_sharpness: rho_0, factor of the cosine in the generator's attention.
        first_layer: "z" makes the 4 x 4 map of the noise alone (the released code); "z_sentence"
            of noise and sentence (the paper's figure 2).
        upsampling: of the generator's blocks, "nearest" (the released code) or "bilinear", which
            draws no cell borders: shapes come sooner, at the cost of a slower step.
    """

    image_size: int = 128
    gf: int = 96
    df: int = 96
    z_dim: int = 128
    cond_dim: int = 128
    text_encoder: str = "minilm"
    text_width: int = 384
    words: int = 17
    sentence: str = "masked_mean"
    attention: str = "shared"
    attention_sharpness: float = 15.0
    first_layer: str = "z"
    upsampling: str = "nearest"

    def __post_init__(self) -> None:
        for name, allowed in {
            "image_size": tuple(UP),
            "sentence": ("masked_mean", "reference"),
            "attention": ("shared", "per_layer"),
            "first_layer": ("z", "z_sentence"),
            "upsampling": ("nearest", "bilinear"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, not {getattr(self, name)!r}")
        for name in ("gf", "df", "z_dim", "cond_dim", "text_width", "words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")


class Generator(nn.Module):
    """Noise and text to pictures.

    Args:
        config: of the whole model.
    """

    def __init__(self, config: XMCGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.gf * m for m in (16, *UP[config.image_size])]
        condition = config.cond_dim + config.z_dim
        self.sentence = nn.Linear(config.text_width, config.cond_dim)
        first = config.z_dim if config.first_layer == "z" else condition
        self.first = nn.Linear(first, 16 * widths[0])
        for linear in (self.sentence, self.first):
            glorot_normal_(linear.weight, linear.bias)
        self.blocks = nn.ModuleList(UpBlock(a, b, config.upsampling) for a, b in pairwise(widths))
        self.norm = ModulatedNorm(widths[-1])
        self.to_rgb = Conv2d(widths[-1], 3, 3)

        # channels of the two normalisations of every block, and of the head's
        layers = [c for pair in pairwise(widths) for c in pair] + [widths[-1]]
        self.modulation = ConditionalModulation(condition, layers[: 2 * GLOBAL_BLOCKS])
        local = layers[2 * GLOBAL_BLOCKS :]
        served = [(local[0], local)] if config.attention == "shared" else [(c, [c]) for c in local]
        self.attentions = nn.ModuleList(
            AttentionalModulation(
                c, config.text_width, condition, cs, sharpness=config.attention_sharpness
            )
            for c, cs in served
        )

    def forward(
        self,
        z: Tensor,
        words: Tensor,
        sentence: Tensor,
        lengths: Tensor,
        *,
        update_stats: bool = True,
    ) -> Tensor:
        """Pictures of the texts.

        Args:
            z: [B, z_dim], standard normal.
            words: [B, T, E], word features.
            sentence: [B, E], sentence features.
            lengths: [B], words of each text; later ones are padding.
            update_stats: False keeps a training forward from moving the running statistics (the
                discriminator's own step discards them).

        Returns:
            [B, 3, S, S] in [0, 1], at least float32.
        """
        condition = torch.cat([self.sentence(sentence), z.to(words.dtype)], 1)
        x = self.first(z if self.config.first_layer == "z" else condition)
        x = x.view(z.shape[0], 4, 4, -1).permute(0, 3, 1, 2)  # channels_last
        sources = [constant(pair) for pair in self.modulation(condition)]
        for i, block in enumerate(self.blocks[:GLOBAL_BLOCKS]):
            x = block(x, sources[2 * i], sources[2 * i + 1], update_stats)
        sources = self.local_sources(x, words, lengths, condition)
        for i, block in enumerate(self.blocks[GLOBAL_BLOCKS:]):
            x = block(x, sources[2 * i], sources[2 * i + 1], update_stats)
        x = self.to_rgb(self.norm(x, *sources[-1](x), update_stats))
        return to_picture(x)

    def local_sources(
        self, x: Tensor, words: Tensor, lengths: Tensor, condition: Tensor
    ) -> list[Condition]:
        """What gives gamma and beta to each layer after the 16 x 16 map x."""
        if self.config.attention == "shared":
            return [constant(pair) for pair in self.attentions[0](x, words, lengths, condition)]
        return [attending(attend, words, lengths, condition) for attend in self.attentions]


def constant(pair: tuple[Tensor, Tensor]) -> Condition:
    return lambda _: pair


def attending(attend: nn.Module, words: Tensor, lengths: Tensor, condition: Tensor) -> Condition:
    return lambda x: attend(x, words, lengths, condition)[0]


class DiscriminatorOutput(NamedTuple):
    """What the discriminator makes of N pictures and B sentences.

    logits [N], float32: how real, given the sentence. pooled [N, 16 df], float32: the picture's
    feature. regions [N, 256, E]: features of the 16 x 16 locations. sentence [B, 16 df]: the
    sentence in the space of `pooled`.
    """

    logits: Tensor
    pooled: Tensor
    regions: Tensor
    sentence: Tensor


class Discriminator(nn.Module):
    """Pictures and sentences to logits, and to the features that the contrastive losses compare.

    Args:
        config: of the whole model.
    """

    def __init__(self, config: XMCGANConfig) -> None:
        super().__init__()
        widths = [config.df * m for m in DOWN[config.image_size]]
        self.first = FirstDownBlock(3, widths[0])
        last = len(widths) - 2
        self.blocks = nn.ModuleList(
            DownBlock(a, b, down=i < last) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.region_block = {64: 0, 128: 1, 256: 2}[config.image_size]
        self.regions = SpectralConv2d(widths[self.region_block + 1], config.text_width, 1)
        self.sentence = SpectralLinear(config.text_width, widths[-1])
        self.logit = SpectralLinear(widths[-1], 1)

    def forward(
        self, images: Tensor | Sequence[Tensor], sentence: Tensor | Sequence[Tensor]
    ) -> Any:
        """Judges pictures; call it once a step, for spectral norm's sake.

        Args:
            images: [N, 3, S, S] in [0, 1], N a whole multiple of B; or several such batches, judged
                apart by the same weights: what is differentiated of one does not run through all.
            sentence: [B, E], sentence features; of several batches, those of all or of each.

        Returns:
            a DiscriminatorOutput; a list of them for several batches.

        Raises:
            ValueError: N is no whole multiple of B.
        """
        with normalised_once(self):
            groups = [images] if isinstance(images, Tensor) else images
            each = [sentence] * len(groups) if isinstance(sentence, Tensor) else sentence
            judged = [self.judge(*pair) for pair in zip(groups, each, strict=True)]
            return judged[0] if isinstance(images, Tensor) else judged

    def judge(self, images: Tensor, sentence: Tensor) -> DiscriminatorOutput:
        if images.shape[0] % sentence.shape[0]:
            raise ValueError(
                f"{images.shape[0]} images do not share out to {sentence.shape[0]} sentences"
            )
        x = self.first(images)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.region_block:
                regions = self.regions(x).permute(0, 2, 3, 1).flatten(1, 2)
        pooled = at_least_float(F.relu(x)).sum((2, 3))
        e = at_least_float(self.sentence(sentence))
        matched = (pooled.unflatten(0, (-1, e.shape[0])) * e).sum(2).flatten()
        logits = at_least_float(self.logit(pooled)).squeeze(1) + matched
        return DiscriminatorOutput(logits, pooled, regions, e)


class XMCGAN(TextToImage):
    """XMC-GAN: `generate` draws pictures of captions.

    Args:
        config: of both networks.
    """

    model_type: ClassVar[str] = "xmcgan"
    config_class: ClassVar[type[XMCGANConfig]] = XMCGANConfig

    def __init__(self, config: XMCGANConfig | None = None) -> None:
        super().__init__()
        self.config = config or XMCGANConfig()
        self.generator = Generator(self.config)
        self.discriminator = Discriminator(self.config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._encoder: list[Any] = []  # in a list: not a submodule, not in the state dict

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def noise_width(self) -> int:
        return self.config.z_dim

    @property
    def text_encoder(self) -> Any:
        """The frozen encoder that the config names, loaded when first asked for, on our device."""
        if not self._encoder:
            from fastxm.encoders import text_encoder

            name, options = self.config.text_encoder, {"sentence": self.config.sentence}
            self.attach(text_encoder(name, max_length=self.config.words, **options))
        return self._encoder[0].to(self.device)

    def attach(self, encoder: Any) -> None:
        """Uses this text encoder, a module: encoder(captions) has words, sentence and lengths."""
        if encoder.width != self.config.text_width:
            raise ValueError(
                f"the model reads text features of width {self.config.text_width}, "
                f"the encoder gives {encoder.width}"
            )
        self._encoder[:] = [encoder]
