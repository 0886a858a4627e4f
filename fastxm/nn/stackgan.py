"""Blocks of the StackGAN family: gated generators in stages, and discriminators that judge twice.

Convolutions have no bias, a batch norm follows each but the first, and generators are gated: a
layer of c channels makes 2 c, of which one half times the sigmoid of the other remains (GLU).
(H. Zhang et al., StackGAN++, TPAMI 2018; T. Xu et al., AttnGAN, CVPR 2018.)
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.nn.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d
from fastxm.nn.blocks import Conv2d
from fastxm.nn.outputs import at_least_float


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)


def gated(c_in: int, c_out: int) -> nn.Sequential:
    """[B, c_in, H, W] -> [B, c_out, H, W]: convolution, batch norm, gate."""
    return nn.Sequential(conv3x3(c_in, 2 * c_out), BatchNorm2d(2 * c_out), nn.GLU(1))


def gated_up(c_in: int, c_out: int, up: str = "nearest") -> nn.Sequential:
    """[B, c_in, H, W] -> [B, c_out, 2 H, 2 W], by "nearest" or "bilinear" interpolation."""
    doubling = Conv2d(c_in, 2 * c_out, 3, up=up, bias=False)
    return nn.Sequential(doubling, BatchNorm2d(2 * c_out), nn.GLU(1))


class GatedResidual(nn.Module):
    """x plus two convolutions of it, the first gated; [B, C, H, W] stays [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *gated(channels, channels), conv3x3(channels, channels), BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class FirstStage(nn.Module):
    """A vector to a map: a gated linear layer to 4 x 4, then doublings, each halving channels.

    Args:
        width: of the vector.
        channels: of the result.
        doublings: 4 give 64 x 64.
        up: "nearest" or "bilinear".
    """

    def __init__(self, width: int, channels: int, doublings: int = 4, up: str = "nearest") -> None:
        super().__init__()
        first = channels << doublings
        self.linear = nn.Sequential(
            nn.Linear(width, 32 * first, bias=False), BatchNorm1d(32 * first), nn.GLU(1)
        )
        steps = pairwise(first >> i for i in range(doublings + 1))
        self.up = nn.Sequential(*(gated_up(a, b, up) for a, b in steps))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] -> [B, channels, 4 * 2^doublings, 4 * 2^doublings]."""
        return self.up(self.linear(x).unflatten(1, (-1, 4, 4)))


class ConditioningAugmentation(nn.Module):
    """A Gaussian about each condition, and a draw from it: its width keeps the conditions smooth.

    Args:
        width: of the condition.
        code: of the draw.
    """

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4 * code)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, code] of conditions [B, width], at least float32."""
        mean, log_variance = at_least_float(F.glu(self.linear(x), 1)).chunk(2, 1)
        return mean, log_variance


def draw(mean: Tensor, log_variance: Tensor, noise: Tensor | None = None) -> Tensor:
    """A sample of each Gaussian, differentiable to both parameters; noise is standard normal."""
    noise = torch.randn_like(mean) if noise is None else noise
    return mean + noise * (0.5 * log_variance).exp()


def tiled(condition: Tensor, x: Tensor) -> Tensor:
    """A condition [B, D] at every place of a map [B, C, H, W]: [B, D, H, W]."""
    return condition.to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])


def leaky(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, BatchNorm2d(conv.out_channels), nn.LeakyReLU(0.2)]


def halving(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 4, stride=2, padding=1, bias=False)


def trunk(image_size: int, df: int) -> nn.Sequential:
    """Pictures [B, 3, S, S] in [-1, 1] to [B, 8 df, 4, 4]; of 32 px 4 df, of 16 px 2 df."""
    if image_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"image_size is 16, 32, 64, 128 or 256, not {image_size}")
    layers: list[nn.Module] = [halving(3, df), nn.LeakyReLU(0.2)]
    widths = [df << i for i in range(image_size.bit_length() - 3)]  # df to 2, 4, ... 32 df
    for a, b in pairwise(widths):
        layers += leaky(halving(a, b))
    for a, b in pairwise(reversed(widths[3:])):
        layers += leaky(conv3x3(a, b))
    return nn.Sequential(*layers)


class JointFeatures(nn.Module):
    """What two judgements of a picture stand on: its features alone, and beside a condition.

    Args:
        image_size: 16, 32, 64, 128 or 256.
        df: base channels.
        condition: width of the condition.
    """

    def __init__(self, image_size: int, df: int, condition: int) -> None:
        super().__init__()
        self.trunk = trunk(image_size, df)
        self.channels = c = min(8, image_size // 8) * df
        self.joint = nn.Sequential(*leaky(conv3x3(c + condition, c)))

    def head(self) -> nn.Conv2d:
        """Features [B, C, 4, 4] to a number each."""
        return nn.Conv2d(self.channels, 1, 4)

    def features(self, images: Tensor) -> Tensor:
        """[B, C, 4, 4], of pictures [B, 3, S, S] in [0, 1]."""
        return self.trunk(2 * images - 1)

    def beside(self, features: Tensor, condition: Tensor) -> Tensor:
        """[B, C, 4, 4], of features [B, C, 4, 4] and conditions [B, condition]."""
        return self.joint(torch.cat([features, tiled(condition, features)], 1))


class JointDiscriminator(JointFeatures):
    """Judges a picture twice: whether it is real, and whether it is real and of its condition.

    Args:
        image_size, df, condition: as of `JointFeatures`, image_size at least 64.
    """

    def __init__(self, image_size: int, df: int, condition: int) -> None:
        if image_size not in (64, 128, 256):
            raise ValueError(f"image_size is 64, 128 or 256, not {image_size}")
        super().__init__(image_size, df, condition)
        self.conditional = self.head()
        self.unconditional = self.head()

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 8 df, 4, 4] of pictures [B, 3, S, S] in [0, 1], for the two heads."""
        return self.features(images)

    def real(self, features: Tensor) -> Tensor:
        """Logits [B], at least float32, of features [B, 8 df, 4, 4]."""
        return at_least_float(self.unconditional(features)).flatten()

    def matched(self, features: Tensor, condition: Tensor) -> Tensor:
        """Logits [B], at least float32, of features [B, 8 df, 4, 4] and conditions [B, D]."""
        return at_least_float(self.conditional(self.beside(features, condition))).flatten()


def orthogonal_(network: nn.Module, *, zeroed: tuple[type, ...] = (nn.Conv2d, nn.Linear)) -> None:
    """Orthogonal kernels, batch norm's scales about 1: how the family begins.

    Args:
        network: its weights are drawn anew.
        zeroed: layers whose biases become 0; those of others stay as they are.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None and isinstance(module, zeroed):
                nn.init.zeros_(module.bias)
        elif isinstance(module, BatchNorm):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
