"""Spectrally normalised layers: one step of power iteration a training forward.

    v = n(Wᵀ u)        u' = n(W v)        σ = u'ᵀ W v        weight = W / (σ + ε)

W [C_out, K] is the kernel with all but its first axis flattened, n(a) = a / sqrt(Σ a² + ε),
ε = 1e-10; u and v are constants to the gradient. u' replaces u in training only, so that a
network is to be called once a step, on real and generated images together.
(Miyato et al., Spectral Normalization for GANs, ICLR 2018.)
"""

import torch
from torch import Tensor, nn
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

    def reset_parameters(self) -> None:
        glorot_normal_(self.weight, self.bias)
        self.register_buffer("u", 0.01 * torch.randn(self.weight.shape[0]))

    def normalised(self) -> Tensor:
        """The weight over its largest singular value, as estimated; float32 under autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            w = rows(self.weight)  # [C_out, K]
            with torch.no_grad():
                v = unit(self.u @ w)  # [K]
            wv = w @ v  # [C_out]
            u = unit(wv.detach())
            if self.training:
                with torch.no_grad():
                    self.u.copy_(u)
            return self.weight / (u @ wv + EPS)


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

    def forward(self, x: Tensor) -> Tensor:
        weight = self.normalised()
        if self.down:
            weight = F.avg_pool2d(weight, 2, stride=1, padding=1)
            return F.conv2d(x, weight, self.bias, stride=2, padding=self.padding)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class SpectralLinear(Spectral, nn.Linear):  # type: ignore[misc]
    """Linear layer, normalised."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)
