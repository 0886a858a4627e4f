"""The kernels of MMD: what a user states, as frozen dataclasses. Kernels add: `RBF() + Linear()`.

Bandwidths, weights and other numbers may be tensors, and get gradients.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastxm.ops.mmd_pairs import KINDS, Term, distances, value
from fastxm.ops.mmd_parameters import Values, each, halving, mixed, positive, single


class Kernel:
    """What all kernels share."""

    kind: ClassVar[str]
    radial: ClassVar[bool] = True
    degree: int = 1

    def __add__(self, other: "Kernel") -> "Sum":
        return Sum((*self.terms, *other.terms))

    @property
    def terms(self) -> "tuple[Kernel, ...]":
        return (self,)

    def parameters(self, x: Tensor) -> Tensor:
        """[2, K] of x's dtype, for x [..., D]: see mmd_pairs."""
        raise NotImplementedError

    def matrix(self, x: Tensor, y: Tensor, same: bool = False) -> Tensor:
        """[..., N, M] of x [..., N, D] and y [..., M, D]; `same` says that y is x."""
        return self._value(distances(x, y, same) if self.radial else x @ y.mT, x)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., N] of x and y [..., N, D], row by row."""
        return self._value((x - y).square().sum(-1) if self.radial else (x * y).sum(-1), x)

    def term(self, parts: int) -> Term:
        """What native code knows of the kernel, of as many parts."""
        return Term(KINDS.index(self.kind.replace("linear", "polynomial")), self.degree, parts)

    def _value(self, s: Tensor, x: Tensor) -> Tensor:
        parameters = self.parameters(x)
        return value([self.term(parameters.shape[1])], s, parameters.flatten())


@dataclass(frozen=True, eq=False)
class Sum(Kernel):
    """A sum of kernels, made by `+`."""

    parts: tuple[Kernel, ...]

    @property
    def terms(self) -> tuple[Kernel, ...]:
        return self.parts

    def matrix(self, x: Tensor, y: Tensor, same: bool = False) -> Tensor:
        return torch.stack([k.matrix(x, y, same) for k in self.parts]).sum(0)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([k.paired(x, y) for k in self.parts]).sum(0)


@dataclass(frozen=True, eq=False)
class RBF(Kernel):
    """sum_q weights[q] exp(-|x - y|^2 / (2 bandwidths[q]^2))."""

    bandwidths: Values = 1.0
    weights: Values = 1.0
    kind: ClassVar[str] = "rbf"

    def __post_init__(self) -> None:
        positive("bandwidths", self.bandwidths)
        # here, where torch.compile of dynamic shapes does not see the numbers as symbols
        object.__setattr__(self, "degree", 4 if halving(self.bandwidths) else 1)

    def parameters(self, x: Tensor) -> Tensor:
        return mixed(each(self.bandwidths, x, lambda b: 0.5 / b / b), self.weights, x)


@dataclass(frozen=True, eq=False)
class Laplace(RBF):
    """sum_q weights[q] exp(-|x - y| / bandwidths[q])."""

    kind: ClassVar[str] = "laplace"

    def parameters(self, x: Tensor) -> Tensor:
        return mixed(each(self.bandwidths, x, lambda b: 1 / b), self.weights, x)


@dataclass(frozen=True, eq=False)
class RationalQuadratic(Kernel):
    """sum_q weights[q] (1 + |x - y|^2 / (2 alphas[q]))^(-alphas[q])."""

    alphas: Values = (0.2, 0.5, 1.0, 2.0, 5.0)
    weights: Values = 1.0
    kind: ClassVar[str] = "rational_quadratic"

    def __post_init__(self) -> None:
        positive("alphas", self.alphas)

    def parameters(self, x: Tensor) -> Tensor:
        return mixed(self.alphas, self.weights, x)


@dataclass(frozen=True, eq=False)
class Energy(Kernel):
    """-weight |x - y|; mmd2 is the energy distance: norms of |x| + |y| - |x - y| would cancel."""

    weight: float | Tensor = 1.0
    kind: ClassVar[str] = "energy"

    def parameters(self, x: Tensor) -> Tensor:
        return mixed(1.0, single("weight", self.weight), x)


@dataclass(frozen=True, eq=False)
class Polynomial(Kernel):
    """(gamma <x, y> + coef0)^degree; gamma None is 1 / D, as in KID."""

    degree: int = 3
    gamma: float | Tensor | None = None
    coef0: float | Tensor = 1.0
    kind: ClassVar[str] = "polynomial"
    radial: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"degree must be an int, 1 or more, not {self.degree}")

    def parameters(self, x: Tensor) -> Tensor:
        gamma = 1 / x.shape[-1] if self.gamma is None else single("gamma", self.gamma)
        return mixed(gamma, single("coef0", self.coef0), x)


@dataclass(frozen=True, eq=False)
class Linear(Kernel):
    """weight <x, y>: mmd2 (biased) is weight |mean x - mean y|^2."""

    weight: float | Tensor = 1.0
    kind: ClassVar[str] = "linear"
    radial: ClassVar[bool] = False

    def parameters(self, x: Tensor) -> Tensor:
        return mixed(single("weight", self.weight), 0.0, x)
