"""LAFITE: a StyleGAN2 whose style space is conditioned on a joint embedding of text and pictures.

Noise passes a mapping network, text does not: every layer makes its style of both. Trained on
pictures alone, the text embedding is a perturbed picture embedding (`fastxm.models.vdl` learns it).

    S      channels at 4, 8, ..., S: min(channel_base / size, channel_max)
    D(x, h) = f_d(x) + <h, f_s(x)>

(Y. Zhou et al. Towards Language-Free Training for Text-to-Image Generation. CVPR 2022. Parameter
counts and values are those of the released code.)
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastxm.encoders.efficientnet import EfficientNetLite0
from fastxm.encoders.frozen import Looks
from fastxm.models.pretrained import Pretrained
from fastxm.models.text_to_image import TextToImage
from fastxm.nn.directions import NOISES, Gaussian, Heads
from fastxm.nn.outputs import at_least_float
from fastxm.nn.projected import ProjectedHeads
from fastxm.nn.stylegan import (
    GAIN,
    DownBlock,
    EqualConv2d,
    EqualLinear,
    ModulatedConv2d,
    act,
    upsample,
    with_deviation,
)
from fastxm.nn.text import SCALES, scaled
from fastxm.ops.distributed import all_rows

Grain = str | Callable[[Tensor], Tensor]  # noise in the layers, by name, or drawn for x
# root mean square of EfficientNet-Lite0's maps of drawings, the finest first
SPREADS = (8.0, 11.0, 10.0, 8.0, 4.0)


@dataclass(frozen=True)
class LAFITEConfig:
    """What the networks are made of.

    Args:
        image_size: a power of two from 8 on.
        embedding: D, width of the joint embedding of text and pictures.
        z_dim, w_dim: widths of the noise and of what it is mapped to.
        mapping_layers: of the mapping network.
        channel_base, channel_max: channels are min(channel_base / size, channel_max).
        logit: the text's part of a logit, "sample": its own inner product; "batch": the sum over
            the batch, as the released code has it.
        xi: length of the noise that makes a text embedding of a picture's: their cosine is
            1 / sqrt(1 + xi²), which for true pairs of CLIP is 0.3.
        text_lr: the share of Adam's step that the styles' layers of the text take, 0.01 in the
            released code.
        text_scale: "raw" gives the generator's layers unit rows (the released code); "unit" rows of
            mean square 1, as the noise beside them has.
        noise: uniform on the "sphere" (the released code), or "gaussian".
        grain: random noise in every layer, of learnt strength; flat drawings have none.
        perturbation: "fixed", that noise; "trained", a shift and scales that a network gives.
        hidden: width of that network's hidden layers.
        joint_encoder: a directory of it, where it is not saved with the model.
        discriminator: "stylegan2" (the released code); "projected": heads on a frozen
            EfficientNet-Lite0, on its four coarsest maps of 4 x 4 places or more.
        image_encoder_size: side of the pictures that it sees, a power of two from 64 on.
        head_width: channels of the finest head; each coarser one has twice as many.
        picture_width: channels of one more head, on the picture itself; 0 for none.
    """

    image_encoder: ClassVar[str] = "efficientnet-lite0"

    image_size: int = 256
    embedding: int = 512
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    channel_base: int = 32768
    channel_max: int = 512
    logit: str = "sample"
    text_lr: float = 0.01
    text_scale: str = "raw"
    xi: float = 3.0
    noise: str = "sphere"
    grain: bool = True
    perturbation: str = "fixed"
    hidden: int = 1024
    joint_encoder: str = ""
    discriminator: str = "stylegan2"
    image_encoder_size: int = 64
    head_width: int = 24
    picture_width: int = 0

    def __post_init__(self) -> None:
        for name, least in (("image_size", 8), ("image_encoder_size", 64)):
            if (size := getattr(self, name)) < least or size & (size - 1):
                raise ValueError(f"{name} is a power of two from {least} on, not {size}")
        for name, allowed in self.choices().items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, not {getattr(self, name)!r}")
        counts = ("embedding", "z_dim", "w_dim", "mapping_layers", "channel_max", "hidden")
        for name in (*counts, "head_width", "picture_width"):
            if getattr(self, name) < (least := name != "picture_width"):
                raise ValueError(f"{name} is at least {int(least)}, not {getattr(self, name)}")
        for name in ("xi", "text_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, not {getattr(self, name)}")
        if self.channel_base < self.image_size:
            raise ValueError(
                f"channel_base is at least image_size, {self.image_size}, not {self.channel_base}"
            )

    def choices(self) -> dict[str, tuple[str, ...]]:
        """What each named option may be."""
        return {
            "logit": ("sample", "batch"),
            "text_scale": SCALES,
            "noise": NOISES,
            "perturbation": ("fixed", "trained"),
            "discriminator": tuple(DISCRIMINATORS),
        }

    @property
    def sizes(self) -> list[int]:
        """4, 8, ..., image_size."""
        return [4 << k for k in range(self.image_size.bit_length() - 2)]

    @property
    def channels(self) -> list[int]:
        """Of each size."""
        return [min(self.channel_base // size, self.channel_max) for size in self.sizes]

    @property
    def condition(self) -> int:
        """Width of what the networks are given as text."""
        return self.embedding


class Style(nn.Module):
    """A layer's style from w and the text: linear in w and two layers' features of the text.

    Args:
        config: of the model.
        c: width of the style.
    """

    def __init__(self, config: LAFITEConfig, c: int) -> None:
        super().__init__()
        text, w = config.condition, config.w_dim
        middle = (text + w) // 2
        options: dict[str, Any] = {"activate": True, "lr_multiplier": config.text_lr}
        self.text = nn.Sequential(
            EqualLinear(text, middle, **options), EqualLinear(middle, w, **options)
        )
        self.affine = EqualLinear(2 * w, c, bias=1.0)

    def forward(self, w: Tensor, text: Tensor) -> Tensor:
        """w [B, w], text [B, text] -> [B, c]."""
        return self.affine(torch.cat([self.text(text), w], 1))


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias and leaky ReLU.

    Args:
        config: of the model.
        c_in, c_out: channels.
        size: side of the output.
        up: double the size.
    """

    grain: Tensor

    def __init__(
        self, config: LAFITEConfig, c_in: int, c_out: int, size: int, *, up: bool = False
    ) -> None:
        super().__init__()
        self.style = Style(config, c_in)
        self.conv = ModulatedConv2d(c_in, c_out, 3, up=up)
        self.register_buffer("grain", torch.randn(size, size))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor, w: Tensor, text: Tensor, noise: Grain) -> Tensor:
        style = self.style(w, text)
        x = self.conv.convolve(x, style)
        scale = self.conv.scale(style, GAIN).to(x.dtype)
        bias = (self.bias * GAIN).to(x.dtype)[:, None, None]
        if noise == "none":
            return act(x * scale + bias)
        grain = self.grain.to(x.dtype)
        if noise == "random":
            grain = torch.randn(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, device=x.device)
        elif not isinstance(noise, str):
            grain = noise(x)
        grain = grain * (self.noise_strength * GAIN).to(x.dtype)
        return act(torch.addcmul(grain + bias, x, scale))


class ToRGB(nn.Module):
    """A 1 x 1 modulated convolution to colours."""

    def __init__(self, config: LAFITEConfig, c: int) -> None:
        super().__init__()
        self.style = Style(config, c)
        self.conv = ModulatedConv2d(c, 3, 1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(3))
        self.gain = 1 / math.sqrt(c)

    def forward(self, x: Tensor, w: Tensor, text: Tensor) -> Tensor:
        x = self.conv(x, self.style(w, text) * self.gain)
        return x + self.bias.to(x.dtype)[:, None, None]


class Block(nn.Module):
    """The layers of one size: doubling (not at the first), a convolution, colours."""

    def __init__(self, config: LAFITEConfig, c_in: int, c_out: int, size: int) -> None:
        super().__init__()
        up = size > 4
        self.up = StyledConv(config, c_in, c_out, size, up=True) if up else None
        self.conv = StyledConv(config, c_out, c_out, size)
        self.to_rgb = ToRGB(config, c_out)
        self.layers = 1 + up

    def forward(
        self, x: Tensor, rgb: Tensor | None, ws: Sequence[Tensor], text: Tensor, noise: Grain
    ) -> tuple[Tensor, Tensor]:
        """x, the picture so far and layers + 1 rows of w -> x and the picture at this size."""
        if self.up is not None:
            x = self.up(x, ws[0], text, noise)
        x = self.conv(x, ws[self.layers - 1], text, noise)
        colours = at_least_float(self.to_rgb(x, ws[self.layers], text))
        return x, colours if rgb is None else upsample(rgb) + colours


class Mapping(nn.Module):
    """Noise to w: its rows at unit mean square, then linear layers."""

    def __init__(self, config: LAFITEConfig) -> None:
        super().__init__()
        widths = [config.z_dim] + [config.w_dim] * config.mapping_layers
        self.layers = nn.Sequential(
            *(EqualLinear(a, b, activate=True, lr_multiplier=0.01) for a, b in pairwise(widths))
        )

    def forward(self, z: Tensor) -> Tensor:
        """[B, z_dim] -> [B, w_dim], at least float32: path lengths are gradients to it."""
        z = at_least_float(z)
        with torch.autocast(z.device.type, enabled=False):
            return self.layers(z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))


class Generator(nn.Module):
    """Noise and text embeddings to pictures.

    Args:
        config: of the whole model.

    Attributes:
        num_ws: rows of w, one a convolution and one for the last colours.
    """

    def __init__(self, config: LAFITEConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping = Mapping(config)
        channels = config.channels
        self.const = nn.Parameter(torch.randn(channels[0], 4, 4))
        pairs = [(channels[0], channels[0]), *pairwise(channels)]
        self.blocks = nn.ModuleList(
            Block(config, *pair, size) for pair, size in zip(pairs, config.sizes)
        )
        self.num_ws = 2 * len(channels)

    def synthesis(self, ws: Tensor, text: Tensor, *, noise: Grain | None = None) -> Tensor:
        """Pictures of w [B, num_ws, w_dim] and text [B, condition]: [B, 3, S, S], about [-1, 1].

        The colours of a size share their row of w with the next size's first convolution. Noise is
        as of `forward`, or a function from a layer's x [B, C, H, W] to its own, [B, 1, H, W].
        """
        if not self.config.grain:
            noise = "none"
        noise = noise or ("random" if self.training else "const")
        text = scaled(text, self.config.text_scale)
        x = self.const.expand(ws.shape[0], *self.const.shape)
        rows, at, rgb = ws.unbind(1), 0, None
        for block in self.blocks:
            x, rgb = block(x, rgb, rows[at:], text, noise)
            at += 1 if at == 0 else 2
        assert rgb is not None
        return rgb

    def forward(self, z: Tensor, text: Tensor, *, noise: str | None = None) -> Tensor:
        """Pictures of the texts.

        Args:
            z: [B, z_dim], standard normal.
            text: [B, condition], unit rows.
            noise: added to the layers: "random", the default in training; "const", the same for
                every picture, the default in evaluation; or "none".

        Returns:
            [B, 3, S, S], nominally in [-1, 1], at least float32.
        """
        w = self.mapping(z)
        return self.synthesis(w[:, None].expand(-1, self.num_ws, -1), text, noise=noise)


class DiscriminatorOutput(NamedTuple):
    """What the discriminator makes of B pictures and B texts.

    logits: [B], of a projected one [B, heads], float32: how real, given the text. semantic:
    [B, condition], float32: f_s, the picture's feature in the text's space, the mean of the heads'.
    realness: as logits: f_d, the logit without the text.
    """

    logits: Tensor
    semantic: Tensor
    realness: Tensor


class Discriminator(nn.Module):
    """Pictures and text embeddings to logits, and to the pictures' features in the text's space.

    Args:
        config: of the whole model.

    Attributes:
        group: of torch.distributed, whose ranks' batches are one to the logit "batch".
    """

    group: Any = None

    def __init__(self, config: LAFITEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels[::-1]
        self.from_rgb = EqualConv2d(3, channels[0], 1)
        self.blocks = nn.ModuleList(DownBlock(a, b) for a, b in pairwise(channels))
        last = channels[-1]
        self.conv = EqualConv2d(last + 1, last, 3)
        self.hidden = EqualLinear(16 * last, last, activate=True)
        self.realness = EqualLinear(last, 1)
        self.semantic = EqualLinear(last, config.condition)

    def forward(self, images: Tensor, text: Tensor) -> DiscriminatorOutput:
        """Judges pictures [B, 3, S, S], nominally in [-1, 1], beside texts [B, condition]."""
        x = self.from_rgb(images)
        for block in self.blocks:
            x = block(x)
        x = at_least_float(self.conv(with_deviation(x)))
        with torch.autocast(x.device.type, enabled=False):
            x = self.hidden(x.flatten(1))
            realness, semantic = self.realness(x).squeeze(1), self.semantic(x)
            matched = (semantic * text.to(semantic.dtype)).sum(1)
            if self.config.logit == "batch":
                matched = all_rows(matched, self.group).sum()
        return DiscriminatorOutput(realness + matched, semantic, realness)


class ProjectedDiscriminator(Looks):
    """Judges as `Discriminator` does, by heads on the maps of a frozen network (`nn.projected`).

    Args:
        config: of the whole model.
    """

    group: Any = None

    def __init__(self, config: LAFITEConfig) -> None:
        super().__init__()
        self.config = config
        sides = [config.image_encoder_size >> (i + 1) for i in range(len(SPREADS))]
        self.used = sum(side >= 4 for side in sides)
        channels, sizes = (x[: self.used][-4:] for x in (EfficientNetLite0.channels, sides))
        widths = config.head_width, config.condition
        picture = config.image_size, config.picture_width
        self.heads = ProjectedHeads(channels, sizes, *widths, picture=picture)

    def forward(self, images: Tensor, text: Tensor) -> DiscriminatorOutput:
        """Judges pictures [B, 3, S, S], nominally in [-1, 1], beside texts [B, condition]."""
        maps = self.image_encoder.features(images / 2 + 0.5, self.used)[-4:]
        maps = [x / spread for x, spread in zip(maps, SPREADS[: self.used][-4:])]
        realness, semantic = self.heads(maps, images)
        with torch.autocast(images.device.type, enabled=False):
            matched = (semantic * text.to(semantic.dtype)[:, None]).sum(2)
            if self.config.logit == "batch":
                matched = all_rows(matched, self.group).sum(0, keepdim=True)
        return DiscriminatorOutput(realness + matched, semantic.mean(1), realness)


DISCRIMINATORS: dict[str, Any] = {"stylegan2": Discriminator, "projected": ProjectedDiscriminator}


class LAFITE(TextToImage):
    """LAFITE: `generate` draws pictures of captions, by their embeddings alone.

    The joint encoder of text and pictures is attached; a `DualEncoder` is saved with the model, in
    its subfolder `encoder`, of a CLIP the config keeps the directory.

    Args:
        config: of both networks.
    """

    model_type: ClassVar[str] = "lafite"
    config_class: ClassVar[type[LAFITEConfig]] = LAFITEConfig
    config: LAFITEConfig
    generator: Generator
    discriminator: Discriminator | ProjectedDiscriminator
    perturbation: Heads

    def __init__(self, config: LAFITEConfig | None = None) -> None:
        super().__init__()
        self.config = config or self.config_class()
        self.generator = Generator(self.config)
        self.discriminator = DISCRIMINATORS[self.config.discriminator](self.config)
        if self.config.perturbation == "trained":
            width = self.config.embedding
            self.perturbation = Heads(width, width, self.config.hidden, zero=False)
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
        """The joint encoder, on our device.

        Raises:
            ValueError: none is attached, and the config names none.
        """
        if not self._encoder:
            if not self.config.joint_encoder:
                raise ValueError(f"{self.model_type} has no joint encoder: attach one")
            from fastxm.encoders import joint_encoder

            self.attach(joint_encoder(self.config.joint_encoder))
        return self._encoder[0].to(self.device)

    def attach(self, encoder: Any) -> None:
        """Uses this joint encoder: encoder.embed_text(captions) is [B, D], unit rows."""
        if encoder.width != self.config.embedding:
            raise ValueError(
                f"the model reads embeddings of width {self.config.embedding}, "
                f"the encoder gives {encoder.width}"
            )
        self._encoder[:] = [encoder]

    def encode(self, captions: list[str], batch_size: int) -> list[Tensor]:
        """What the networks are given of B captions, [B, condition]."""
        starts = range(0, len(captions), batch_size)
        encoder = self.text_encoder
        parts = [encoder.embed_text(captions[start : start + batch_size]) for start in starts]
        return [self.condition(torch.cat(parts).to(self.device, self.dtype))]

    def condition(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        """[B, condition]: what the networks are given, of a text embedding [B, D]."""
        return text

    def picture(self, drawn: Tensor) -> Tensor:
        return (drawn.float() / 2 + 0.5).clamp(0, 1)

    def prior(self, image: Tensor) -> Any:
        """What is taken of the text embedding, of the picture's embedding [B, D] alone."""
        if self.config.perturbation == "fixed":
            return Gaussian(image, self.config.xi)
        shift, log_scale = self.perturbation(image)
        return Gaussian(image + shift, math.sqrt(image.shape[1]) * log_scale.exp())

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        super().save_pretrained(directory)
        if self._encoder and isinstance(self._encoder[0], Pretrained):
            self._encoder[0].save_pretrained(Path(directory) / "encoder")

    @classmethod
    def from_pretrained(cls: type[Self], directory: str | os.PathLike[str]) -> Self:
        model = super().from_pretrained(directory)
        if (Path(directory) / "encoder").is_dir():
            from fastxm.encoders import joint_encoder

            model.attach(joint_encoder(Path(directory) / "encoder"))
        return model
