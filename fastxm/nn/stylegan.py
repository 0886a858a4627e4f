"""StyleGAN2's layers in plain PyTorch: differentiable to any order, so that R1 is right.

    EqualLinear     y = act(x (m g W)ᵀ + m b)              g = 1 / sqrt(fan in), m = lr_multiplier
    ModulatedConv   y[o] = d[o] sum_i W[o, i] * (s[i] x[i])    d[o] = rsqrt(sum (W[o, i] s[i])² + ε)
    fir             [1, 3, 3, 1] / 8 along each axis
    act             sqrt(2) leaky_relu(x + b, 0.2)

Scaling the input by s and the output by d is the convolution of each picture with weights of its
own: one dense convolution of the batch takes the place of a grouped one. A positive factor passes
through act, so that sqrt(2) is the weights' and b's.
(Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020.)
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE, GAIN = 0.2, math.sqrt(2)
HALF = math.sqrt(0.5)
EPS = 1e-8
GROUP = 4  # pictures whose deviation is taken together


def taps(x: Tensor, gain: float = 1.0) -> Tensor:
    """[1, 3, 3, 1] / 8 times gain, made on x's device: a copy of numbers would wait for it."""
    found = x.new_full((4,), 0.125 * gain)
    found[1:3] = 0.375 * gain
    return found


def act(x: Tensor) -> Tensor:
    """leaky_relu(x, 0.2), in place."""
    return F.leaky_relu(x, SLOPE, inplace=True)


def fir(x: Tensor, *, pad: int) -> Tensor:
    """The low-pass filter [1, 3, 3, 1] / 8 along both axes, of x [B, C, H, W].

    Args:
        x: [B, C, H, W].
        pad: zeros around x.
    """
    C = x.shape[1]
    kernel = taps(x)
    x = F.conv2d(x, kernel.view(1, 1, 4, 1).expand(C, 1, 4, 1), padding=(pad, 0), groups=C)
    return F.conv2d(x, kernel.view(1, 1, 1, 4).expand(C, 1, 1, 4), padding=(0, pad), groups=C)


def upsample(x: Tensor) -> Tensor:
    """x [B, C, H, W] with zeros between its pixels, filtered: [B, C, 2H, 2W]."""
    C = x.shape[1]
    row = taps(x, 2.0)
    kernel = torch.outer(row, row).expand(C, 1, 4, 4)
    return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=C)


class EqualLinear(nn.Module):
    """A linear layer whose weight is scaled as it is used: all layers learn equally fast.

    Args:
        c_in, c_out: widths.
        activate: follow it by the leaky ReLU.
        lr_multiplier: m, of weight and bias.
        bias: its value at the start.
    """

    def __init__(self, c_in: int, c_out: int, *, activate: bool = False, lr_multiplier: float = 1.0,
                 bias: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((c_out,), bias / lr_multiplier))
        self.activate, self.lr_multiplier = activate, lr_multiplier
        self.gain = 1 / math.sqrt(c_in)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in] -> [B, c_out]."""
        scale = self.lr_multiplier * (GAIN if self.activate else 1.0)
        weight, bias = self.weight * (self.gain * scale), self.bias * scale
        # no narrower than x, which may be wider on purpose (`lafite.Mapping`)
        dtype = torch.promote_types(weight.dtype, x.dtype)
        y = F.linear(x, weight.to(dtype), bias.to(dtype))
        return act(y) if self.activate else y


class EqualConv2d(nn.Module):
    """A convolution whose weight is scaled as it is used; the leaky ReLU follows if it has a bias.

    Args:
        c_in, c_out: channels.
        kernel: its side, odd.
        down: filter and halve: before a kernel of 3 or more, and before one of 1 too.
        bias: add one and activate.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, *, down: bool = False,
                 bias: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None
        self.down, self.gain = down, 1 / math.sqrt(c_in * kernel**2)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H, W], or [B, c_out, H / 2, W / 2], times gain."""
        pad, bias = self.weight.shape[-1] // 2, None
        if self.bias is not None:
            gain = gain * GAIN
            bias = self.bias * gain
        weight = self.weight * (self.gain * gain)
        if not self.down:
            x = F.conv2d(x, weight, bias, padding=pad)
        else:
            x = F.conv2d(fir(x, pad=pad + 1), weight, bias, stride=2)
        return x if bias is None else act(x)


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels are scaled by a style.

    Args:
        c_in, c_out: channels.
        kernel: its side, odd.
        up: double the size, by a transposed convolution and the filter.
        demodulate: scale each output channel back to unit variance.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, *, up: bool = False,
                 demodulate: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.up, self.demodulate = up, demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """[B, c_in, H, W], style [B, c_in] -> [B, c_out, H, W] or [B, c_out, 2H, 2W]."""
        x = self.convolve(x, style)
        return x * self.scale(style).to(x.dtype) if self.demodulate else x

    def convolve(self, x: Tensor, style: Tensor) -> Tensor:
        """What `forward` scales."""
        x = x * style[:, :, None, None].to(x.dtype)
        if not self.up:
            return F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)
        return fir(F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2), pad=1) * 4

    def scale(self, style: Tensor, gain: float = 1.0) -> Tensor:
        """d [B, c_out, 1, 1] times gain, in the style's precision or better."""
        with torch.autocast(style.device.type, enabled=False):
            power = self.weight.square().sum((2, 3))  # [c_out, c_in]
            d = torch.rsqrt(style.to(power.dtype).square() @ power.T + EPS)
            return (d * gain)[:, :, None, None]


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


def with_deviation(x: Tensor, group: int = GROUP) -> Tensor:
    """x [B, C, H, W] with one more channel: how much the pictures of a group differ.

    A group holds `group` pictures, or the largest smaller number that divides B.
    """
    B, C, H, W = x.shape
    size = next(n for n in range(min(group, B), 0, -1) if B % n == 0)
    y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    y = y.reshape(size, -1, C, H, W)
    y = (y - y.mean(0)).square().mean(0)
    y = (y + EPS).sqrt().mean((1, 2, 3))  # [B / size]
    y = y.to(x.dtype).repeat(size)[:, None, None, None].expand(B, 1, H, W)
    return torch.cat([x, y], 1)
