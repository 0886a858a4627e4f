"""Residual blocks of generators (up) and discriminators (down)."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fastxm.nn.init import glorot_normal_
from fastxm.nn.modulation import ModulatedNorm
from fastxm.nn.spectral import SpectralConv2d

Condition = Callable[[Tensor], tuple[Tensor, Tensor]]  # features -> gamma, beta


class Conv2d(nn.Conv2d):
    """Convolution of stride 1 that keeps the size, or first doubles it.

    Args:
        c_in, c_out: channels.
        kernel: its side, odd.
        up: double the input's size first, by "nearest" or "bilinear" interpolation; "" does not.
            Four nearest neighbours are one input, so that is one transposed convolution of stride 2
            with summed kernels: 4 products for 9, the same numbers. It is used from 8 x 8 inputs
            on; below, the many channels of few pixels make it slower.
        bias: add one.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, up: str = "", bias: bool = True
    ) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2, bias=bias)
        self.up = up

    def reset_parameters(self) -> None:
        glorot_normal_(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.up == "nearest" and x.shape[-1] >= 8:
            weight = F.avg_pool2d(self.weight, 2, stride=1, padding=1, divisor_override=1)
            weight = weight.transpose(0, 1).flip(2, 3)  # [C_in, C_out, 4, 4]
            return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)
        if self.up:
            x = upsample(x, self.up)
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


def upsample(x: Tensor, mode: str = "nearest") -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode=mode)


class UpBlock(nn.Module):
    """Residual block that doubles the size, each convolution after a modulated normalisation.

    A 1 x 1 convolution and upsampling commute, so the skip path convolves first.

    Args:
        c_in, c_out: channels.
        up: "nearest" or "bilinear".
    """

    def __init__(self, c_in: int, c_out: int, up: str = "nearest") -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(c_in)
        self.conv1 = Conv2d(c_in, c_out, 3, up=up)
        self.norm2 = ModulatedNorm(c_out)
        self.conv2 = Conv2d(c_out, c_out, 3)
        self.skip = Conv2d(c_in, c_out, 1)

    def forward(
        self, x: Tensor, first: Condition, second: Condition, update_stats: bool = True
    ) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, 2 H, 2 W].

        Args:
            x: [B, c_in, H, W].
            first, second: what gives the gamma and beta of each normalisation from its input.
            update_stats: whether training moves the running statistics.
        """
        h = self.conv1(self.norm1(x, *first(x), update_stats))
        h = self.conv2(self.norm2(h, *second(h), update_stats))
        return h + upsample(self.skip(x), self.conv1.up)


class FirstDownBlock(nn.Module):
    """Residual block on images that halves the size; nothing is activated before it.

    Pooling and a 1 x 1 convolution commute, so the skip path pools first.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = SpectralConv2d(c_in, c_out, 3)
        self.conv2 = SpectralConv2d(c_out, c_out, 3, down=True)
        self.skip = SpectralConv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H / 2, W / 2]."""
        return self.conv2(F.relu(self.conv1(x))) + self.skip(F.avg_pool2d(x, 2))


class DownBlock(nn.Module):
    """Residual block with activations first; it halves the size if `down`.

    The skip path takes the input before activation, and is a convolution where shapes change.
    """

    def __init__(self, c_in: int, c_out: int, *, down: bool = True) -> None:
        super().__init__()
        self.down = down
        self.conv1 = SpectralConv2d(c_in, c_out, 3)
        self.conv2 = SpectralConv2d(c_out, c_out, 3, down=down)
        self.skip = SpectralConv2d(c_in, c_out, 1) if down or c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H / 2, W / 2], or [B, c_out, H, W] without `down`."""
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return h + self.skip(F.avg_pool2d(x, 2) if self.down else x)
