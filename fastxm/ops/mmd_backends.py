"""Which backend visits the pairs of an MMD, and one problem or many small ones by it."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastxm.ops import dispatch, gemm, mmd_cuda, mmd_triton
from fastxm.ops.mmd_native import at_once
from fastxm.ops.mmd_problems import many, ranges
from fastxm.ops.mmd_reference import Options, unpack
from fastxm.ops.mmd_rows import Function, Rows, finish, samples
from fastxm.ops.mmd_tiles import Maker, native, plain, visit

MAKERS: dict[str, Maker] = {
    "reference": plain,
    "cpu": native,
    "cuda": mmd_cuda.epilogue,
    "triton": mmd_triton.fused,
}
# rows of a tile, any number; where C++ has products of its own it takes all tiles at once
TILE = {"reference": 2048, "cpu": 512, "cuda": mmd_cuda.TILE, "triton": mmd_triton.TILE}
SMALL = 256  # rows of a problem that one thread of a CPU takes alone
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # x, y, a, b, c, parameters
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def backend(a: Tensor, derivatives: bool) -> str:
    """The C++ tiles on a CPU. On a GPU Triton, but CUDA for float64 and where the kernel's own
    numbers get gradients, which Triton's kernel has not; else the formula's tiles. a: of the width.
    """
    float64 = a.dtype == torch.float64
    offered = [name for name in MAKERS if not (name == "triton" and float64)]
    auto = "cpu" if a.device.type == "cpu" else "reference"
    if a.is_cuda:
        first = ("cuda", "triton") if float64 or derivatives else ("triton", "cuda")
        found = [name for name in first if name in offered and not dispatch.missing(name)]
        auto = found[0] if found else "reference"
    return dispatch.choose("mmd", a.device, auto, offered)


def forward(
    inputs: Inputs,
    starts: tuple[Tensor | None, Tensor | None],
    options: Options,
    wanted: Sequence[bool],
) -> Gradients:
    """What `mmd_sums._fwd` returns, of its arguments."""
    x, y, a, b, c, parameters = inputs
    name = backend(a, wanted[2])
    x_starts, y_starts = starts
    if x_starts is None or y_starts is None:
        return one(inputs, name, options, wanted)
    x_places, y_places = ranges(x_starts, len(x)), ranges(y_starts, len(y))
    longest = max((p.stop - p.start for p in (*x_places, *y_places)), default=0)
    if name == "cpu" and longest <= SMALL:
        given = (Function(unpack(options.terms), parameters), x, y, a, b, c, x_starts, y_starts)
        return many(*given, options[1:3], wanted)  # type: ignore[return-value]
    found = [one((x[i], y[j], a[i], b[j], c[g : g + 1], parameters), name, options, wanted)
             for g, (i, j) in enumerate(zip(x_places, y_places))]  # fmt: skip
    return tuple(map(torch.cat, zip(*found)))  # type: ignore[return-value]


@contextlib.contextmanager
def tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Whether the vendor's products of float32 on a GPU may be of TF32."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def one(inputs: Inputs, name: str, options: Options, wanted: Sequence[bool]) -> Gradients:
    """One problem, by tiles."""
    x, y, a, b, c, parameters = inputs
    numbers, drop_self, drop_paired, precision = options
    terms, make, tile = unpack(numbers), MAKERS[name], TILE[name]
    if name == "cpu" and a.dtype in gemm.PACKED:
        function = Function(terms, parameters, precision=precision)
        return at_once(function, x, y, a, b, c, options[1:3], wanted)
    radial = terms[0].radial
    half = precision == "bfloat16" and name != "cpu"
    derivatives = c.new_zeros(len(parameters))
    # of a CPU they are read at once, of a GPU without waiting
    of_xx, of_yy, of_xy = c[0].unbind() if c.is_cuda else c[0].tolist()
    function = Function(terms, parameters, derivatives if wanted[2] else None, precision)
    with tf32(x.device, precision == "tf32"):
        of_x, of_y = samples(x, y, a, b, radial, half, None)
        xs = Rows.make(of_x[0], of_x[2], a, wanted[0], packed=False)
        ys = Rows.make(of_y[0], of_y[2], b, wanted[1], packed=False)
        p, _ = visit(function, xs, xs, 2 * of_xx, drop_self, make, tile)
        r, _ = visit(function, ys, ys, 2 * of_yy, drop_self, make, tile)
        q, t = visit(function, xs, ys, of_xy, drop_paired, make, tile)
    sums = torch.stack([_dot(u, v) for u, v in ((a, p), (b, r), (a, q))])
    da, db = 2 * of_xx * p + of_xy * q, 2 * of_yy * r + of_xy * t
    return ((c[0] * sums).sum()[None].to(a.dtype), finish(xs, of_x[1], radial),
            finish(ys, of_y[1], radial), da.to(a.dtype), db.to(b.dtype), sums[None],
            derivatives[None])  # fmt: skip


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u.double() * v.double()).sum()
