"""Spectrally normalised layers: one step of power iteration a training forward.

    v = n(Wᵀ u)        u' = n(W v)        σ = u'ᵀ W v        weight = W / (σ + ε)

W [C_out, K] is the kernel with all but its first axis flattened, n(a) = a / sqrt(Σ a² + ε),
ε = 1e-10; u and v are constants to the gradient. u' replaces u in training only. A network that is
called for real and for generated images has the same weights for both in `normalised_once`; outside
of it, each call takes a step of its own.
(Miyato et al., Spectral Normalization for GANs, ICLR 2018.)
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastxm.nn.init import glorot_normal_

EPS = 1e-10


def unit(a: Tensor) -> Tensor:
    return a * torch.rsqrt(a.square().sum() + EPS)


def rows(weight: Tensor) -> Tensor:
    """[C_out, K], without a copy for either memory format (the order within K is immaterial)."""
    if weight.ndim == 4 and not weight.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)
    return weight.flatten(1)


class Spectral(nn.Module):
    """What the normalised layers share: weight, bias and the left singular vector u."""

    weight: nn.Parameter
    bias: nn.Parameter
    u: Tensor
    held: Tensor | None = None  # the kernel of `normalised_once`

    def reset_parameters(self) -> None:
        glorot_normal_(self.weight, self.bias)
        self.register_buffer("u", 0.01 * torch.randn(self.weight.shape[0]))

    def kernel(self) -> Tensor:
        """What multiplies the input, in autocast's dtype if any."""
        if self.held is not None:
            return self.held
        weight, kind = self.normalised(), self.weight.device.type
        if torch.is_autocast_enabled(kind):  # here, so that a kernel that is held is cast once
            weight = weight.to(torch.get_autocast_dtype(kind))
        return weight

    def normalised(self) -> Tensor:
        """The weight over its largest singular value, as estimated, in float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            with torch.no_grad():
                w = rows(self.weight)
                v = unit(self.u @ w)  # [K]
                wv = w @ v
                u = unit(wv)  # [C_out]
                if self.training:
                    self.u.copy_(u)
            return DivideBySigma.apply(self.weight, u, v, 1 / (u @ wv + EPS))


class DivideBySigma(torch.autograd.Function):
    """Ŵ = W / (σ + ε) with its gradient, (g - <g, Ŵ> u vᵀ) / (σ + ε), in the fewest passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        out = weight * scale
        ctx.save_for_backward(out, u, v, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out, u, v, scale = ctx.saved_tensors
        if grad.stride() != out.stride():
            grad = torch.empty_like(out).copy_(grad)
        along = torch.dot(rows(grad).flatten(), rows(out).flatten())
        grad = grad * scale
        rows(grad).addr_(u * (-along * scale), v)
        return grad, None, None, None


class SpectralConv2d(Spectral, nn.Conv2d):  # type: ignore[misc]
    """Convolution of stride 1 that keeps the size, or halves it by averaging.

    Args:
        c_in, c_out: channels.
        kernel: its side, odd.
        down: average the result over 2 x 2. A mean of four shifted convolutions is one
            convolution of stride 2 with the averaged kernel: 16 products for 36, the same numbers.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, *, down: bool = False) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.down = down

    def normalised(self) -> Tensor:
        weight = super().normalised()
        return F.avg_pool2d(weight, 2, stride=1, padding=1) if self.down else weight

    def forward(self, x: Tensor) -> Tensor:
        stride = 2 if self.down else 1
        return F.conv2d(x, self.kernel(), self.bias, stride=stride, padding=self.padding)


class SpectralLinear(Spectral, nn.Linear):  # type: ignore[misc]
    """Linear layer, normalised."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel(), self.bias)


@contextlib.contextmanager
def normalised_once(network: nn.Module) -> Iterator[None]:
    """Inside, the network may be called more than once, all with one step of power iteration."""
    layers = [module for module in network.modules() if isinstance(module, Spectral)]
    try:
        for layer in layers:
            layer.held = layer.kernel()
        yield
    finally:
        for layer in layers:
            layer.held = None
