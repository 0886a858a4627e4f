"""StyleGAN2's layers against their definitions, and their second derivatives."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from fastxm.nn import stylegan
from fastxm.nn.stylegan import EqualConv2d, EqualLinear, ModulatedConv2d


def upfirdn(x, up=1, down=1, pad=(0, 0)):
    """Zeros between pixels, padding, the outer product of [1, 3, 3, 1] / 8, every down-th."""
    B, C, H, W = x.shape
    wide = x.new_zeros(B, C, H, up, W, up)
    wide[:, :, :, 0, :, 0] = x
    wide = F.pad(wide.reshape(B, C, H * up, W * up), (*pad, *pad))
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    patches = wide.unfold(2, 4, 1).unfold(3, 4, 1)
    return (patches * torch.outer(taps, taps) / 64).sum((4, 5))[:, :, ::down, ::down]


def test_filters_are_their_definition():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(stylegan.upsample(x), upfirdn(x, up=2, pad=(2, 1)) * 4)
    torch.testing.assert_close(stylegan.fir(x, pad=2), upfirdn(x, pad=(2, 2)))


def test_modulation_is_a_convolution_of_each_picture_with_its_own_weight():
    x, style = torch.randn(3, 4, 6, 6).double(), torch.randn(3, 4).double()
    for up in (False, True):
        layer = ModulatedConv2d(4, 5, 3, up=up).double()
        weight = layer.weight * style[:, None, :, None, None]  # [B, C_out, C_in, 3, 3]
        weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
        if up:
            grouped = weight.transpose(1, 2).flatten(0, 1)
            y = F.conv_transpose2d(x.view(1, 12, 6, 6), grouped, stride=2, groups=3)
            y = 4 * upfirdn(y.view(3, 5, 13, 13), pad=(1, 1))
        else:
            y = F.conv2d(x.view(1, 12, 6, 6), weight.flatten(0, 1), padding=1, groups=3)
        torch.testing.assert_close(layer(x, style), y.view(3, 5, *y.shape[-2:]))


def test_weights_are_scaled_as_they_are_used():
    layer = EqualLinear(4, 3, activate=True, lr_multiplier=0.01, bias=0.5)
    assert 30 < layer.weight.std() < 300
    x = torch.randn(2, 4)
    y = F.leaky_relu(x @ (layer.weight * 0.005).T + 0.5, 0.2) * math.sqrt(2)
    torch.testing.assert_close(layer(x), y)
    conv = EqualConv2d(4, 3, 3)
    y = F.conv2d(x[:, :, None, None], conv.weight / 6, padding=1)
    torch.testing.assert_close(conv(x[:, :, None, None], 0.5), F.leaky_relu(y, 0.2) * 0.5**0.5)


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 3), (4, 4), (6, 3), (8, 4)])
def test_deviation_of_groups(batch, size):
    x = torch.randn(batch, 2, 3, 3)
    y = stylegan.with_deviation(x)
    torch.testing.assert_close(y[:, :2], x)
    for i in range(batch):
        group = x[i % (batch // size) :: batch // size]
        deviation = (group.var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[i, 2], deviation.expand(3, 3))


LAYERS = {
    "linear": (EqualLinear(3, 2, activate=True), [(2, 3)]),
    "conv": (EqualConv2d(2, 3, 3), [(2, 2, 4, 4)]),
    "down": (EqualConv2d(2, 3, 3, down=True), [(2, 2, 4, 4)]),
    "skip": (EqualConv2d(2, 3, 1, down=True, bias=False), [(2, 2, 4, 4)]),
    "modulated": (ModulatedConv2d(2, 2, 3), [(2, 2, 3, 3), (2, 2)]),
    "modulated up": (ModulatedConv2d(2, 2, 3, up=True), [(2, 2, 3, 3), (2, 2)]),
    "deviation": (stylegan.with_deviation, [(4, 2, 2, 2)]),
    "upsample": (stylegan.upsample, [(1, 2, 3, 3)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives(name):
    layer, shapes = LAYERS[name]
    layer = layer.double() if isinstance(layer, torch.nn.Module) else layer
    inputs = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    weights = [p for p in getattr(layer, "parameters", list)()]

    def call(*given):
        return layer(*given[: len(inputs)])

    assert gradcheck(call, (*inputs, *weights))
    assert gradgradcheck(call, (*inputs, *weights))
