"""LAFITE: a StyleGAN2 whose style space is conditioned on a joint embedding of text and pictures.

Noise passes a mapping network, text does not: every layer makes its style of both. Trained on
pictures alone, the text embedding is a perturbed picture embedding (`fastxm.models.vdl` learns it).

    S      channels at 4, 8, ..., S: min(channel_base / size, channel_max)
    D(x, h) = f_d(x) + <h, f_s(x)>

(Y. Zhou et al. Towards Language-Free Training for Text-to-Image Generation. CVPR 2022. Parameter
counts and values are those of the released code.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastxm.nn.stylegan import (
    EqualConv2d,
    EqualLinear,
    ModulatedConv2d,
    bias_act,
    upsample,
    with_deviation,
)

HALF = math.sqrt(0.5)


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
    """

    image_size: int = 256
    embedding: int = 512
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    channel_base: int = 32768
    channel_max: int = 512
    logit: str = "sample"

    def __post_init__(self) -> None:
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size is a power of two from 8 on, not {self.image_size}")
        if self.logit not in ("sample", "batch"):
            raise ValueError(f"logit is one of ('sample', 'batch'), not {self.logit!r}")
        for name in ("embedding", "z_dim", "w_dim", "mapping_layers", "channel_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.channel_base < self.image_size:
            raise ValueError(
                f"channel_base is at least image_size, {self.image_size}, not {self.channel_base}"
            )

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
        text, w, c: widths of the text embedding, of w and of the style.
    """

    def __init__(self, text: int, w: int, c: int) -> None:
        super().__init__()
        middle = (text + w) // 2
        options: dict[str, Any] = {"activate": True, "lr_multiplier": 0.01}
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
        up: double the size.
    """

    def __init__(self, config: LAFITEConfig, c_in: int, c_out: int, *, up: bool = False) -> None:
        super().__init__()
        self.style = Style(config.condition, config.w_dim, c_in)
        self.conv = ModulatedConv2d(c_in, c_out, 3, up=up)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor, w: Tensor, text: Tensor, noise: bool) -> Tensor:
        x = self.conv(x, self.style(w, text))
        if noise:
            grain = torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype, device=x.device)
            x = x + grain * self.noise_strength.to(x.dtype)
        return bias_act(x, self.bias)


class ToRGB(nn.Module):
    """A 1 x 1 modulated convolution to colours."""

    def __init__(self, config: LAFITEConfig, c: int) -> None:
        super().__init__()
        self.style = Style(config.condition, config.w_dim, c)
        self.conv = ModulatedConv2d(c, 3, 1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(3))
        self.gain = 1 / math.sqrt(c)

    def forward(self, x: Tensor, w: Tensor, text: Tensor) -> Tensor:
        x = self.conv(x, self.style(w, text) * self.gain)
        return (x + self.bias.to(x.dtype)[:, None, None]).clamp(-256, 256)


class Block(nn.Module):
    """The layers of one size: doubling (not at the first), a convolution, colours."""

    def __init__(self, config: LAFITEConfig, c_in: int, c_out: int, *, up: bool = True) -> None:
        super().__init__()
        self.up = StyledConv(config, c_in, c_out, up=True) if up else None
        self.conv = StyledConv(config, c_out, c_out)
        self.to_rgb = ToRGB(config, c_out)
        self.layers = 1 + up

    def forward(
        self, x: Tensor, rgb: Tensor | None, ws: Sequence[Tensor], text: Tensor, noise: bool
    ) -> tuple[Tensor, Tensor]:
        """x, the picture so far and layers + 1 rows of w -> x and the picture at this size."""
        if self.up is not None:
            x = self.up(x, ws[0], text, noise)
        x = self.conv(x, ws[self.layers - 1], text, noise)
        colours = self.to_rgb(x, ws[self.layers], text)
        colours = colours.to(torch.promote_types(colours.dtype, torch.float32))
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
        """[B, z_dim] -> [B, w_dim]."""
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
        self.blocks = nn.ModuleList(Block(config, *pair, up=i > 0) for i, pair in enumerate(pairs))
        self.num_ws = 2 * len(channels)

    def synthesis(self, ws: Tensor, text: Tensor, *, noise: bool = True) -> Tensor:
        """Pictures of w [B, num_ws, w_dim] and text [B, condition]: [B, 3, S, S], about [-1, 1].

        The colours of a size share their row of w with the next size's first convolution.
        """
        x = self.const.expand(len(ws), *self.const.shape)
        rows, at, rgb = ws.unbind(1), 0, None
        for block in self.blocks:
            x, rgb = block(x, rgb, rows[at:], text, noise)
            at += block.layers
        assert rgb is not None
        return rgb

    def forward(self, z: Tensor, text: Tensor, *, noise: bool = True) -> Tensor:
        """Pictures of the texts.

        Args:
            z: [B, z_dim], standard normal.
            text: [B, condition], unit rows.
            noise: add noise to the layers.

        Returns:
            [B, 3, S, S], nominally in [-1, 1], at least float32.
        """
        w = self.mapping(z)
        return self.synthesis(w[:, None].expand(-1, self.num_ws, -1), text, noise=noise)


class DiscriminatorOutput(NamedTuple):
    """What the discriminator makes of B pictures and B texts.

    logits: [B], float32: how real, given the text. semantic: [B, condition], float32: f_s, the
    picture's feature in the text's space. realness: [B], float32: f_d, the logit without the text.
    """

    logits: Tensor
    semantic: Tensor
    realness: Tensor


class DownBlock(nn.Module):
    """Two convolutions beside a skip path; the size is halved."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = EqualConv2d(c_in, c_in, 3)
        self.down = EqualConv2d(c_in, c_out, 3, down=True)
        self.skip = EqualConv2d(c_in, c_out, 1, down=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H / 2, W / 2]."""
        return self.down(self.conv(x), HALF) + self.skip(x, HALF)


class Discriminator(nn.Module):
    """Pictures and text embeddings to logits, and to the pictures' features in the text's space.

    Args:
        config: of the whole model.
    """

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
        x = self.conv(with_deviation(x))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            x = self.hidden(x.flatten(1))
            realness, semantic = self.realness(x).squeeze(1), self.semantic(x)
            matched = (semantic * text.to(semantic.dtype)).sum(1)
            if self.config.logit == "batch":
                matched = matched.sum()
        return DiscriminatorOutput(realness + matched, semantic, realness)
