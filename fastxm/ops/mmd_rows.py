"""What a visit of tiles reads and adds to: the kernel, the rows of a sample."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fastxm.ops import gemm
from fastxm.ops.mmd_pairs import KINDS, Term


@dataclass
class Function:
    """A kernel, or a sum of kernels all radial or none, as mmd_pairs states it."""

    terms: list[Term]
    parameters: Tensor  # [P], of all terms
    derivatives: Tensor | None = None  # [P], float64, added to if given
    precision: str = "float32"  # of products (see mmd2)
    # for mmd_moments, which has tiles of `native` alone; float64 scalars
    squares: Tensor | None = None  # sum of k^2 over pairs, each once; added to if given
    square: Tensor | None = None  # w is (scale[i] + scale[j] + square k) slope if given
    kinds: Tensor = field(init=False)  # [terms, 3]: kind, degree, K

    def __post_init__(self) -> None:
        self.parameters = self.parameters.contiguous()
        terms = [[*term] for term in self.terms]
        self.kinds = torch.tensor(terms, dtype=torch.int64, device="cpu")

    @property
    def radial(self) -> bool:
        return self.terms[0].radial

    @cached_property
    def stacked(self) -> Tensor:
        """[2, parts], shapes and weights of the parts of all terms."""
        return torch.cat(self._pairs(), 1)

    @cached_property
    def ascending(self) -> Tensor:
        """As `stacked`, but the shapes of each term's Gaussians ascend; found without waiting."""
        pairs = zip(self.terms, self._pairs())
        return torch.cat([own[:, own[0].argsort()] if KINDS[term.kind] == "rbf" and term.parts > 1
                          else own for term, own in pairs], 1)  # fmt: skip

    def _pairs(self) -> list[Tensor]:
        own = self.parameters.split([2 * term.parts for term in self.terms])
        return [p.view(2, -1) for p in own]

    def numbers(self, parameters: Tensor) -> list[int]:
        """MmdKernel of csrc/cpu/mmd.h, with parameters as the native code takes them."""
        wide, count = parameters.dtype == torch.float64, parameters.numel()
        return [wide, len(self.terms), count, self.kinds.data_ptr(), parameters.data_ptr()]


@dataclass
class Rows:
    """One sample, or a range of its rows, and what a visit adds to it."""

    z: Tensor  # [N, D], what products are taken of
    panels: Tensor | None  # z packed (see gemm), for a CPU
    norms: Tensor  # [N], squared, of z
    weight: Tensor  # [N]
    scale: Tensor  # [N], weight times the coefficient of the visit; float64 for a square
    potential: Tensor  # [N], float64
    slopes: Tensor  # [N], sums of w
    other: Tensor  # [N, D], what gradients of the other sample are products of; packed with panels
    gradient: Tensor | None  # [N, D], if wanted

    @classmethod
    def make(cls, z: Tensor, other: Tensor, weight: Tensor, gradient: bool, packed: bool) -> "Rows":
        zeros = torch.zeros_like(weight)
        dz = torch.zeros_like(other, dtype=weight.dtype) if gradient else None
        panels = gemm.pack(z) if packed else None
        if panels is not None:
            found = gemm.pack(other, depth=True)
            assert found is not None  # it is of the dtype of z
            other = found
        some = z.split(1 << 16 if z.is_cuda else 1024)  # of a CPU they stay in the cache
        norms = torch.cat([t.to(weight.dtype).square().sum(1) for t in some])
        return cls(z, panels, norms, weight, weight, zeros, torch.zeros_like(weight), other, dz)

    def begin(self, coefficient: Tensor | float) -> "Rows":
        scale = coefficient * self.weight
        potential = torch.zeros_like(scale, dtype=torch.float64)
        return replace(self, scale=scale, potential=potential)

    def part(self, start: int, size: int) -> "Rows":
        some = slice(start, start + size)
        gradient = None if self.gradient is None else self.gradient[some]
        assert self.panels is None  # of which C++ takes the tiles itself
        return Rows(self.z[some], None, self.norms[some], self.weight[some], self.scale[some],
                    self.potential[some], self.slopes[some], self.other[some],
                    gradient)  # fmt: skip


def samples(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, radial: bool, half: bool, centre: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Of x and of y: what products are taken of, the centred rows, and these for gradients.

    Distances do not change with the origin, and lose less to rounding around the mean of all rows.
    Rows that come as halves are exact, and so are their products: they stay as they are, and
    only in the gradients, which are sums of w (y - x), are differences from the mean rounded.
    """
    if radial and centre is None:
        sums = x.sum(0, dtype=a.dtype) + y.sum(0, dtype=a.dtype)
        centre = sums / (len(x) + len(y))
    # less the centre, which is of the wide dtype, in one pass
    exact = [z.to(a.dtype) if centre is None else z - centre for z in (x, y)]
    exact = [z.contiguous() for z in exact]
    if not half:
        return (exact[0],) * 3, (exact[1],) * 3
    rounded = [z.to(torch.bfloat16) for z in exact]
    given = x.dtype == y.dtype == torch.bfloat16
    products = gemm.operands(*((x, y) if given else rounded))
    return (products[0], exact[0], rounded[0]), (products[1], exact[1], rounded[1])


def finish(rows: Rows, exact: Tensor, radial: bool) -> Tensor:
    """The gradient of rows, or an empty tensor where it is not wanted."""
    if rows.gradient is None:
        return exact.new_empty(0)
    gradient = rows.gradient
    return gradient.addcmul_(rows.slopes[:, None], exact, value=-1) if radial else gradient


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y less the mean of all rows: distances stay, and lose less to rounding."""
    centre = (x.detach().sum(0) + y.detach().sum(0)) / (len(x) + len(y))
    return x - centre, y - centre
