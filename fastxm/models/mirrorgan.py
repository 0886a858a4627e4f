"""MirrorGAN: text to picture in three stages, and back to text.

STEM reads the caption; GLAM draws it three times, each time at twice the side and with attention to
the words and the sentence; STREAM describes what was drawn. At 256 px, base channels gf and df:

    F0    noise and sentence -> [16 gf, 4, 4] -> four doublings -> [gf, 64, 64]
    F1    [gf, 64, 64] beside its words and its sentence -> residual blocks -> [gf, 128, 128]
    F2    likewise -> [gf, 256, 256];   each of the three is drawn by a convolution and tanh
    D     a picture to [8 df, 4, 4], and from there to two logits: alone, and beside the sentence

Smaller pictures have fewer doublings. Attention to words gives every place of f [N, C] the sum
softmax(f Uw) Uw over the words that are there; attention to the sentence V s weighs its channels,
V s softmax(K (f V s)), the softmax being over the channels.
(T. Qiao, J. Zhang, D. Xu, D. Tao. MirrorGAN: Learning Text-to-image Generation by Redescription.
CVPR 2019. Layers are those of the released code, but for its mask of the padding, which served
each place with the mask of another caption.)
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.encoders.damsm import DAMSM, DAMSMConfig
from fastxm.models.stream import STREAM, STREAMConfig
from fastxm.models.text_to_image import TextToImage
from fastxm.nn.outputs import at_least_float, to_picture
from fastxm.nn.stackgan import (
    ConditioningAugmentation,
    FirstStage,
    GatedResidual,
    JointFeatures,
    conv3x3,
    draw,
    gated_up,
    orthogonal_,
)
from fastxm.nn.text import SCALES, scaled

STAGES = 3


@dataclass(frozen=True)
class GLAMConfig:
    """What generator and discriminators are made of.

    Args:
        image_size: side of the last pictures, 4 times that of the first: 64, 128 or 256.
        gf, df: base channels of generator and discriminators.
        z_dim: width of the noise.
        cond_dim: width of the augmented sentence.
        blocks: residual blocks of the second and of the third stage.
        upsampling: "nearest" (the released code) or "bilinear", which draws no cell borders.
        text_scale: "raw" takes words and sentence as STEM gives them (the released code); "unit"
            scales each to a mean square of 1. A STEM of few steps gives numbers of 0.05, which
            beside noise and pictures are hardly seen.
    """

    image_size: int = 256
    gf: int = 32
    df: int = 64
    z_dim: int = 100
    cond_dim: int = 100
    blocks: int = 2
    upsampling: str = "nearest"
    text_scale: str = "raw"

    def __post_init__(self) -> None:
        for name, allowed in {
            "image_size": (64, 128, 256),
            "upsampling": ("nearest", "bilinear"),
            "text_scale": SCALES,
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, not {getattr(self, name)!r}")
        for name in ("gf", "df", "z_dim", "cond_dim", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides of the three pictures."""
        return tuple(self.image_size >> (STAGES - 1 - i) for i in range(STAGES))


@dataclass(frozen=True)
class MirrorGANConfig:
    """What the whole model is made of.

    Args:
        glam: generator and discriminators.
        damsm: the text encoder STEM, and the image half that it was trained with.
        stream: the captioner.
    """

    glam: GLAMConfig
    damsm: DAMSMConfig
    stream: STREAMConfig

    def __post_init__(self) -> None:
        ours, theirs = self.damsm.stem.vocabulary, self.stream.vocabulary
        if ours != theirs:
            raise ValueError(
                "damsm and stream have vocabularies of their own: train both on the same data "
                f"({len(ours)} and {len(theirs)} words, {len(set(ours) & set(theirs))} shared)"
            )


class GlobalLocalAttention(nn.Module):
    """What each place of a map makes of the words and of the sentence.

    Args:
        channels: C of the map.
        text_width: E of the words.
        cond_dim: width of the augmented sentence.
    """

    def __init__(self, channels: int, text_width: int, cond_dim: int) -> None:
        super().__init__()
        self.word = nn.Linear(text_width, channels, bias=False)  # U
        self.sentence = nn.Linear(cond_dim, channels)  # V
        self.gate = nn.Conv2d(channels, channels, 1, bias=False)  # K

    def forward(self, x: Tensor, words: Tensor, lengths: Tensor, condition: Tensor) -> Tensor:
        """[B, 2 C, H, W]: attended words, then the attended sentence.

        Args:
            x: [B, C, H, W].
            words: [B, T, E], padding after each caption's length.
            lengths: [B], 1 to T.
            condition: [B, cond_dim].
        """
        keys = self.word(words)  # [B, T, C]
        there = present(words, lengths)[:, None]  # [B, 1, T]: of every place the same
        query = x.flatten(2).mT.to(keys.dtype)  # [B, N, C]
        local = F.scaled_dot_product_attention(query, keys, keys, there, scale=1.0)
        sentence = self.sentence(condition)[:, :, None, None].to(x.dtype)
        whole = sentence * self.gate(x * sentence).float().softmax(1).to(x.dtype)
        return torch.cat([local.mT.unflatten(2, x.shape[2:]).to(x.dtype), whole], 1)


def present(words: Tensor, lengths: Tensor) -> Tensor:
    """[B, T], which words are there."""
    return torch.arange(words.shape[1], device=words.device) < lengths[:, None]


def first_stage(width: int, channels: int, size: int, up: str) -> nn.Sequential:
    """Noise and sentence [B, width] to the first map [B, channels, size, size]."""
    stage = FirstStage(width, channels, int(math.log2(size // 4)), up)
    linear, norm, gate = stage.linear
    square = nn.Unflatten(1, (-1, 4, 4))
    # flat, as saved models name its weights
    parts = {"linear": linear, "norm": norm, "gate": gate, "square": square, "ups": stage.up}
    return nn.Sequential(OrderedDict(parts))


class NextStage(nn.Module):
    """A map beside what it attends to, to a map of twice the side."""

    def __init__(self, config: GLAMConfig, text_width: int) -> None:
        super().__init__()
        c = config.gf
        self.attention = GlobalLocalAttention(c, text_width, config.cond_dim)
        self.join = nn.Conv2d(3 * c, 2 * c, 1, bias=False)
        self.blocks = nn.Sequential(*(GatedResidual(2 * c) for _ in range(config.blocks)))
        self.up = gated_up(2 * c, c, config.upsampling)

    def forward(self, x: Tensor, words: Tensor, lengths: Tensor, condition: Tensor) -> Tensor:
        attended = self.attention(x, words, lengths, condition)
        return self.up(self.blocks(self.join(torch.cat([x, attended], 1))))


class Drawn(NamedTuple):
    """Three pictures of each caption, and the distribution of the augmented sentence.

    images: [B, 3, S, S] each in [0, 1], at least float32, the smallest first. mean, log_var:
    [B, cond_dim].
    """

    images: list[Tensor]
    mean: Tensor
    log_var: Tensor


class Generator(nn.Module):
    """GLAM: noise and text to pictures.

    Args:
        config: of the networks.
        text_width: E of words and sentence.
    """

    def __init__(self, config: GLAMConfig, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.augmentation = ConditioningAugmentation(text_width, config.cond_dim)
        features = config.cond_dim + config.z_dim
        self.first = first_stage(features, config.gf, config.sizes[0], config.upsampling)
        self.next = nn.ModuleList(NextStage(config, text_width) for _ in range(STAGES - 1))
        self.to_rgb = nn.ModuleList(conv3x3(config.gf, 3) for _ in range(STAGES))
        orthogonal_(self)

    def forward(self, noise: Tensor, words: Tensor, sentence: Tensor, lengths: Tensor) -> Drawn:
        """Pictures of the texts.

        Args:
            noise: [B, z_dim + cond_dim], standard normal: z, and that of the augmentation.
            words: [B, T, E].
            sentence: [B, E].
            lengths: [B], words of each text, 1 to T.
        """
        words, sentence = (scaled(text, self.config.text_scale) for text in (words, sentence))
        z, e = noise.split([self.config.z_dim, self.config.cond_dim], 1)
        mean, log_var = self.augmentation(sentence)
        condition = draw(mean, log_var, e).to(z.dtype)
        x = self.first(torch.cat([condition, z], 1))
        maps = [x]
        for stage in self.next:
            x = stage(x, words, lengths, condition)
            maps.append(x)
        return Drawn([to_picture(rgb(x)) for rgb, x in zip(self.to_rgb, maps)], mean, log_var)


class Discriminator(JointFeatures):
    """Pictures of one size to logits: alone, and beside a sentence.

    Args:
        df: base channels.
        size: side of the pictures, 16 to 256.
        text_width: E of the sentence.
        text_scale: as in GLAMConfig.
    """

    def __init__(self, df: int, size: int, text_width: int, text_scale: str = "raw") -> None:
        super().__init__(size, df, text_width)
        self.text_scale = text_scale
        self.alone = self.head()
        self.matched = self.head()
        # the released code leaves the heads' biases as they come
        orthogonal_(self, zeroed=(nn.Linear,))

    def forward(self, images: Tensor, *sentences: Tensor) -> list[Tensor]:
        """How real pictures are: first alone, then beside each of the sentences.

        Args:
            images: [B, 3, S, S] in [0, 1].
            sentences: [B, E] each.

        Returns:
            logits [B] each, at least float32.
        """
        features = self.features(images)
        logits = [self.alone(features)]
        for sentence in sentences:
            sentence = scaled(sentence, self.text_scale)
            logits.append(self.matched(self.beside(features, sentence)))
        return [at_least_float(logit).flatten() for logit in logits]


class MirrorGAN(TextToImage):
    """MirrorGAN: `generate` draws pictures of captions, `caption` describes pictures.

    Args:
        config: of all networks; the vocabulary is in it.
    """

    model_type: ClassVar[str] = "mirrorgan"
    config_class: ClassVar[type[MirrorGANConfig]] = MirrorGANConfig

    def __init__(self, config: MirrorGANConfig) -> None:
        super().__init__()
        self.config = config
        width = config.damsm.stem.width
        self.damsm = DAMSM(config.damsm)
        self.stream = STREAM(config.stream)
        self.generator = Generator(config.glam, width)
        self.discriminators = nn.ModuleList(
            Discriminator(config.glam.df, size, width, config.glam.text_scale)
            for size in config.glam.sizes
        )
        for network in (self.generator, self.discriminators):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def image_size(self) -> int:
        return self.config.glam.image_size

    @property
    def noise_width(self) -> int:
        return self.config.glam.z_dim + self.config.glam.cond_dim

    @property
    def text_encoder(self) -> Any:
        return self.damsm.stem

    def attach(self, encoder: Any) -> None:
        """Reads captions with this STEM, of the same configuration."""
        self.damsm.stem = encoder

    def picture(self, drawn: Drawn) -> Tensor:
        return drawn.images[-1]

    def caption(self, images: Tensor, *, beams: int = 1, max_words: int = 20) -> list[str]:
        """Describes pictures [B, 3, H, W] in [0, 1]: B texts; see `STREAM.caption`."""
        return self.stream.caption(images, beams=beams, max_words=max_words)

    def redescribe(self, captions: Sequence[str], *, seed: int = 0, beams: int = 1) -> list[str]:
        """What the captioner says of pictures drawn of these captions."""
        return self.caption(self.generate(captions, seed=seed), beams=beams)
