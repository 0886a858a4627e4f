"""The part of a projected discriminator that learns: heads on mixed maps of a frozen network.

    maps of several strides  ->  fixed random mixing of channels, and of scales from coarse to fine
                             ->  a head each: D_l(x, h) = f_d,l(x) + <h, f_s,l(x)>

Heads on the maps as they are would go by a few of their channels; mixed at random, every channel
carries a little of all of them, and of what coarser maps know.
(Sauer et al., Projected GANs Converge Faster, NeurIPS 2021; the projection of a condition is that
of Miyato & Koyama, cGANs with Projection Discriminator, ICLR 2018.)
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.nn.outputs import at_least_float
from fastxm.nn.spectral import SpectralConv2d, SpectralLinear
from fastxm.nn.stylegan import EqualLinear

SLOPE = 0.2
HALF = math.sqrt(0.5)


class Mixing(nn.Module):
    """Fixed random projections of feature maps: no parameters, their kernels are buffers.

    To each map what the next coarser one gave is added, doubled in size, and both are mixed again.

    Args:
        channels: of the maps, the finest first.
        widths: channels of each after mixing.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.last = len(widths) - 1
        for i, (c, width) in enumerate(zip(channels, widths, strict=True)):
            self.keep(f"channels{i}", width, c, 1)
            self.keep(f"mixed{i}", width, width, 3)
        for i, (fine, coarse) in enumerate(pairwise(widths)):
            self.keep(f"coarser{i}", fine, coarse, 1)

    def keep(self, name: str, c_out: int, c_in: int, side: int) -> None:
        kernel = torch.randn(c_out, c_in, side, side) / math.sqrt(c_in * side**2)
        self.register_buffer(name, kernel)

    def convolve(self, x: Tensor, name: str) -> Tensor:
        kernel = getattr(self, name)
        return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[B, channels[i], S_i, S_i], each half as wide as the last -> [B, widths[i], S_i, S_i]."""
        places = range(self.last + 1)
        mixed = [self.convolve(x, f"channels{i}") for i, x in zip(places, maps, strict=True)]
        for i in reversed(places):
            if i < self.last:
                coarser = self.convolve(mixed[i + 1], f"coarser{i}")
                up = F.interpolate(coarser, scale_factor=2.0, mode="bilinear")
                mixed[i] = (mixed[i] + up) * HALF
            mixed[i] = self.convolve(mixed[i], f"mixed{i}")
        return mixed


class Head(nn.Module):
    """One scale's judgement: spectrally normalised layers down to 4 x 4; f_d of all its places.

    f_s is of their mean: a text says what is there, and a generator follows it sooner so.

    Args:
        size: side of the map, a power of two from 4 on.
        width: its channels.
        text: width of the text.
    """

    def __init__(self, size: int, width: int, text: int) -> None:
        super().__init__()
        halvings = size.bit_length() - 3
        self.down = nn.ModuleList(
            SpectralConv2d(width, width, 3, down=True) for _ in range(halvings)
        )
        self.conv = SpectralConv2d(width, width, 3)
        self.hidden = SpectralLinear(16 * width, width)
        self.realness = SpectralLinear(width, 1)
        self.semantic = EqualLinear(width, text)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, width, size, size] -> f_d [B] and f_s [B, text], at least float32."""
        for layer in (*self.down, self.conv):
            x = F.leaky_relu(layer(x), SLOPE)
        hidden = at_least_float(F.leaky_relu(self.hidden(x.flatten(1)), SLOPE))
        with torch.autocast(x.device.type, enabled=False):
            mean = at_least_float(x).mean((2, 3))
            return self.realness(hidden).squeeze(1), self.semantic(mean)


class PictureHead(nn.Module):
    """A head on the picture itself: a frozen network hardly minds the tone of a ground.

    Args:
        size: side of the pictures, a power of two from 8 on.
        width: channels.
        text: width of the text.
    """

    def __init__(self, size: int, width: int, text: int) -> None:
        super().__init__()
        self.first = SpectralConv2d(3, width, 3, down=True)
        self.head = Head(size // 2, width, text)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, size, size] -> f_d [B] and f_s [B, text]."""
        return self.head(F.leaky_relu(self.first(images), SLOPE))


class ProjectedHeads(nn.Module):
    """Mixed maps and their heads, each twice as wide as that of the next finer map.

    Args:
        channels: of the maps, the finest first.
        sizes: their sides, each half of the last, at least 4.
        width: of the finest map, mixed, and of its head.
        text: width of the text.
        picture: side of the pictures and channels of one more head, on them; of 0 channels none.

    Raises:
        ValueError: the sizes are not so, or not as many as the channels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sizes: Sequence[int],
        width: int,
        text: int,
        *,
        picture: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        if min(sizes) < 4 or any(fine != 2 * coarse for fine, coarse in pairwise(sizes)):
            raise ValueError(f"each map is half as wide as the last, at least 4, not {sizes}")
        widths = [width << i for i in range(len(sizes))]
        self.mixing = Mixing(channels, widths)
        self.heads = nn.ModuleList(Head(*pair, text) for pair in zip(sizes, widths))
        self.picture = PictureHead(*picture, text) if picture[1] else None

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, channels[i], sizes[i], sizes[i]] and the pictures that they are of, [B, 3, S, S].

        Returns:
            f_d [B, heads] and f_s [B, heads, text].
        """
        judged = [head(x) for head, x in zip(self.heads, self.mixing(maps), strict=True)]
        if self.picture is not None:
            judged.append(self.picture(images))
        realness, semantic = zip(*judged)
        return torch.stack(realness, 1), torch.stack(semantic, 1)
