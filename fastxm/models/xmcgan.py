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

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.losses import hinge_d, hinge_g, nce, region_word_loss
from fastxm.models.pretrained import Pretrained
from fastxm.nn import (
    AttentionalModulation,
    ConditionalModulation,
    DownBlock,
    FirstDownBlock,
    ModulatedNorm,
    SpectralConv2d,
    SpectralLinear,
    UpBlock,
)
from fastxm.nn.blocks import Conv2d
from fastxm.nn.init import glorot_normal_

UP = {64: (16, 8, 4, 2), 128: (16, 8, 4, 2, 1), 256: (16, 8, 8, 4, 2, 1)}
DOWN = {64: (1, 2, 4, 8, 16), 128: (1, 2, 4, 8, 16, 16), 256: (1, 2, 4, 8, 8, 16, 16)}
GLOBAL_BLOCKS = 2  # 4 -> 8 -> 16, before any word is seen
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        attention: "shared" attends once, at 16 x 16, for all layers (the released code);
            "per_layer" lets every layer attend from its own features (the paper's figure 2), at
            the cost of an E-channel query map at every size.
        attention_sharpness: rho_0, factor of the cosine in the generator's attention.
        first_layer: "z" makes the 4 x 4 map of the noise alone (the released code); "z_sentence"
            of noise and sentence (the paper's figure 2).
    """

    image_size: int = 128
    gf: int = 96
    df: int = 96
    z_dim: int = 128
    cond_dim: int = 128
    text_encoder: str = "minilm"
    text_width: int = 384
    words: int = 17
    attention: str = "shared"
    attention_sharpness: float = 15.0
    first_layer: str = "z"

    def __post_init__(self) -> None:
        for name, allowed in {
            "image_size": tuple(UP),
            "attention": ("shared", "per_layer"),
            "first_layer": ("z", "z_sentence"),
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
        self.blocks = nn.ModuleList(UpBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.norm = ModulatedNorm(widths[-1])
        self.to_rgb = Conv2d(widths[-1], 3, 3)

        # channels of the two normalisations of every block, and of the head's
        layers = [c for pair in zip(widths, widths[1:]) for c in pair] + [widths[-1]]
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
            [B, 3, S, S] in (0, 1), at least float32.
        """
        condition = torch.cat([self.sentence(sentence), z.to(words.dtype)], 1)
        x = self.first(z if self.config.first_layer == "z" else condition)
        x = x.view(len(z), 4, 4, -1).permute(0, 3, 1, 2)  # channels_last
        pairs = iter(self.modulation(condition))
        sources: Iterator[Any] = (constant(pair) for pair in pairs)
        for block in self.blocks[:GLOBAL_BLOCKS]:
            x = block(x, next(sources), next(sources), update_stats)
        attend = [
            partial(attention, words=words, lengths=lengths, condition=condition)
            for attention in self.attentions
        ]
        if self.config.attention == "shared":
            sources = (constant(pair) for pair in attend[0](x))
        else:
            sources = (only(source) for source in attend)
        for block in self.blocks[GLOBAL_BLOCKS:]:
            x = block(x, next(sources), next(sources), update_stats)
        x = self.to_rgb(self.norm(x, *next(sources)(x), update_stats))
        return (torch.tanh(x.to(torch.promote_types(x.dtype, torch.float32))) + 1) / 2
