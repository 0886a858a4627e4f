"""Distributions of unit vectors around others, and the heads that move them.

    Gaussian         u = mean + radius * e, e of mean square length 1, then t = u / |u|
    von Mises-Fisher p(t) = C(k) exp(k <m, t>),  C(k) = k^v / ((2 pi)^(v+1) I_v(k)),  v = D/2 - 1

A Gaussian of radius x around a unit vector has the mean cosine 1 / sqrt(1 + x²) with it, nearly.
Its KL is that of u, of which t is a function: an upper bound of t's own. The noise e is either
N(0, 1/D) in each place or uniform on the unit sphere, which it approaches as D grows.
(Kingma & Welling 2014; Davidson et al. 2018; Wood 1994.)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POINTS, SPREAD = 513, 8.0  # of the table of a cosine's distribution; its standard deviations
NOISES = ("sphere", "gaussian")


class Noise(NamedTuple):
    """What a sample is made of: direction [B, D], of mean square length 1, and uniform [B]."""

    direction: Tensor
    uniform: Tensor


def draw_noise(
    count: int,
    width: int,
    *,
    form: str = "sphere",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Noise:
    """Noise of `count` samples of `width` numbers; `form` is "sphere" or "gaussian"."""
    if form not in NOISES:
        raise ValueError(f"noise is one of {NOISES}, not {form!r}")
    drawn = torch.randn(count, width + 1, generator=generator, device=device)
    direction, last = drawn[:, :width], drawn[:, width]
    direction = F.normalize(direction, dim=1) if form == "sphere" else direction / math.sqrt(width)
    return Noise(direction, torch.special.ndtr(last))


class Gaussian:
    """A normalised Gaussian.

    Args:
        mean: [B, D].
        radius: [B, D] or a number: sqrt(D) standard deviations of each coordinate.
    """

    def __init__(self, mean: Tensor, radius: Tensor | float) -> None:
        self.mean, self.radius = mean, radius

    @property
    def direction(self) -> Tensor:
        """[B, D], the mean at unit length."""
        return F.normalize(self.mean, dim=1)

    def sample(self, noise: Noise) -> Tensor:
        """[B, D], unit rows, differentiable to mean and radius."""
        return F.normalize(self.mean + self.radius * noise.direction, dim=1)

    def kl(self, prior: "Gaussian") -> Tensor:
        """[B], in nats: of this one's u from the prior's."""
        width = self.mean.shape[1]
        ratio = torch.as_tensor(self.radius) / prior.radius  # [B, D] or []
        moved = (self.mean - prior.mean) / prior.radius
        terms = ratio.square() - 1 - 2 * ratio.log() + width * moved.square()
        return terms.expand_as(self.mean).sum(1) / 2

    def log_density(self, t: Tensor) -> Tensor:
        """[B], of unit vectors t [B, D]: that of a von Mises-Fisher of the same mean cosine.

        A Gaussian's own density of u lies far from the unit sphere.
        """
        power = torch.as_tensor(self.radius).square().expand_as(self.mean).mean(1)
        length = self.mean.square().sum(1)
        cosine = (length / (length + power)).sqrt()
        return VonMisesFisher(self.direction, concentration(cosine, t.shape[1])).log_density(t)


class VonMisesFisher:
    """The von Mises-Fisher distribution of unit vectors.

    Args:
        direction: m [B, D], unit rows, D at least 4.
        concentration: k [B], above 0.
    """

    def __init__(self, direction: Tensor, concentration: Tensor) -> None:
        if direction.shape[1] < 4:
            raise ValueError(f"von Mises-Fisher needs 4 dimensions, not {direction.shape[1]}")
        self.direction, self.concentration = direction, concentration

    def sample(self, noise: Noise) -> Tensor:
        """[B, D], unit rows, differentiable to direction and concentration.

        The cosine with m by its inverted distribution function, the rest by a tangent direction.
        """
        m = self.direction
        cosine = sample_cosine(self.concentration, noise.uniform, m.shape[1])[:, None]
        tangent = noise.direction - (noise.direction * m).sum(1, keepdim=True) * m
        sine = (1 - cosine.square()).clamp(min=1e-12).sqrt()
        return F.normalize(cosine * m + sine * F.normalize(tangent, dim=1), dim=1)

    def kl(self, prior: "VonMisesFisher") -> Tensor:
        """[B], in nats, of this one from the prior."""
        width = self.direction.shape[1]
        k, p = self.concentration.double(), prior.concentration.double()
        apart = (self.direction - prior.direction).double().square().sum(1) / 2  # 1 - cosine
        cosine = mean_cosine(k, width)
        normal = log_normaliser(k, width) - log_normaliser(p, width)
        return ((k - p + p * apart) * cosine + normal).to(self.direction.dtype)

    def log_density(self, t: Tensor) -> Tensor:
        """[B], of unit vectors t [B, D]."""
        k = self.concentration.double()
        along = (self.direction * t).sum(1).double()
        return (k * along + log_normaliser(k, t.shape[1])).to(t.dtype)


def log_bessel(order: float, k: Tensor) -> Tensor:
    """log I_order(k), by Debye's uniform expansion to its third term: for orders from 1 on."""
    root = (k.square() + order**2).sqrt()
    leading = root - order * torch.asinh(order / k) - (2 * math.pi * root).log() / 2
    return leading + debye(order / root, order).log()


def debye(p: Tensor, order: float) -> Tensor:
    """1 + u1(p) / order + u2(p) / order², of the expansion (DLMF 10.41.10)."""
    first = p * (3 - 5 * p.square()) / 24
    second = p.square() * (81 - 462 * p.square() + 385 * p**4) / 1152
    return 1 + first / order + second / order**2


def log_normaliser(k: Tensor, width: int) -> Tensor:
    """log C(k) of the von Mises-Fisher in `width` dimensions."""
    order = width / 2 - 1
    return order * k.log() - (order + 1) * math.log(2 * math.pi) - log_bessel(order, k)


def mean_cosine(k: Tensor, width: int) -> Tensor:
    """A(k) = I_{v+1}(k) / I_v(k), the mean of <m, t>: just the slope of -log C(k) here.

    Of the two together no divergence is below 0.
    """
    order = width / 2 - 1
    root = (k.square() + order**2).sqrt()
    p = order / root
    slope = (3 - 15 * p.square()) / 24 / order
    slope = slope + p * (162 - 1848 * p.square() + 2310 * p**4) / 1152 / order**2
    turn = slope * (-p * k / root.square()) / debye(p, order)
    return k / (root + order) - k / (2 * root.square()) + turn


def concentration(cosine: Tensor, width: int) -> Tensor:
    """The k with a mean cosine in (0, 1), to about 0.05 % (Banerjee et al. 2005)."""
    return cosine * (width - cosine.square()) / (1 - cosine.square())


def sample_cosine(k: Tensor, uniform: Tensor, width: int) -> Tensor:
    """[B], cosines with the mean direction at the levels uniform [B] in (0, 1).

    The distribution function is tabled about the mode; within a cell it is linear, which gives
    the gradient to k that implicit differentiation of it has.
    """
    power = (width - 3) / 2
    with torch.no_grad():
        mode = (-power + (power**2 + k.square()).sqrt()) / k
        deviation = (1 - mode.square()) / (2 * power * (1 + mode.square())).sqrt()
        low = (mode - SPREAD * deviation).clamp(min=-1 + 1e-6)
        high = (mode + SPREAD * deviation).clamp(max=1 - 1e-6)
        steps = torch.linspace(0, 1, POINTS, dtype=k.dtype, device=k.device)
        grid = low[:, None] + (high - low)[:, None] * steps  # [B, P]
    logits = k[:, None] * grid + power * torch.log1p(-grid.square())
    density = (logits - logits.detach().amax(1, keepdim=True)).exp()
    cells = density[:, 1:] + density[:, :-1]
    above = (cells / cells.sum(1, keepdim=True)).cumsum(1)  # [B, P - 1]
    cell = torch.searchsorted(above.detach(), uniform[:, None]).clamp(max=POINTS - 2)
    upper = above.gather(1, cell)
    lower = torch.where(cell > 0, above.gather(1, (cell - 1).clamp(min=0)), 0.0)
    place = ((uniform[:, None] - lower) / (upper - lower).clamp(min=1e-12)).clamp(0, 1)
    start, end = grid.gather(1, cell), grid.gather(1, cell + 1)
    return (start + place * (end - start)).squeeze(1)


class Heads(nn.Module):
    """Two perceptrons of three hidden layers each: a shift and a log scale of each coordinate.

    Args:
        inputs, outputs: widths.
        hidden: width of the hidden layers.
        zero: start from no shift and no scale.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 1024, *, zero: bool = True) -> None:
        super().__init__()
        self.shift, self.log_scale = (perceptron(inputs, hidden, outputs) for _ in range(2))
        if zero:
            for parameter in (*self.shift[-1].parameters(), *self.log_scale[-1].parameters()):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, inputs] -> shift and log scale, [B, outputs]; the log scale in [-4, 2]."""
        return self.shift(x), self.log_scale(x).clamp(-4, 2)


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, hidden, hidden):
        layers += [nn.Linear(width, hidden), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))
