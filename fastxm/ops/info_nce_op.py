"""InfoNCE as one op of PyTorch: which backend runs, what is kept, and autograd."""

import math
from typing import Any

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops import info_nce_cuda as cuda
from fastxm.ops import info_nce_reference as reference
from fastxm.ops import info_nce_rows as rows
from fastxm.ops import info_nce_tiles as tiles
from fastxm.ops import info_nce_triton as triton
from fastxm.ops.autograd import differentiable, gradient
from fastxm.ops.dispatch import no_autocast

BACKENDS = {"reference": reference, "cpu": tiles, "cuda": cuda, "triton": triton}
# elements whose products cost as much time as to write one product and read it again; elsewhere
# products are made again: a GPU makes them faster, or the whole problem is one launch
WORTH = {"cpu": 64}


def store(x: Tensor, y: Tensor, budget: int) -> bool:
    """Whether to keep the products for the backward: they fit, and are slower to make again.

    6 N M D operations for 8; but each product is written and read: 2 * itemsize bytes. With r
    operations and c bytes a second that is less than 2 D operations from D = itemsize r / c on:
    of bfloat16 both itemsize and the time of an operation are half.
    """
    itemsize = dispatch.wide_dtype(x, y).itemsize
    if x.device.type == "cpu" and tiles.fits(x, y):
        itemsize = 2 if tiles.halves(x, y) else 4
    size = x.shape[0] * y.shape[0] * itemsize
    return size <= budget and x.shape[1] >= WORTH.get(x.device.type, math.inf)


def backend(x: Tensor, y: Tensor) -> Any:
    """The C++ blocks on a CPU. On a GPU CUDA, which launches once for a small problem and also
    takes float64, or Triton for any other that is larger; else the formula."""
    device, float64 = x.device, dispatch.wide_dtype(x, y) == torch.float64
    offered = [name for name in BACKENDS if not (name == "triton" and float64)]
    auto = "cpu" if device.type == "cpu" else "reference"
    if device.type == "cuda":
        first = ("cuda", "triton") if float64 or cuda.small(x, y) else ("triton", "cuda")
        found = [name for name in first if name in offered and not dispatch.missing(name)]
        auto = found[0] if found else "reference"
    return BACKENDS[dispatch.choose("info_nce", device, auto, offered)]


def _losses(x: Tensor, y: Tensor, scale: Tensor, normalize: bool, labels: Tensor | None,
            symmetric: bool, smoothing: float, offset: int, stored: bool, metrics: bool = True,
            ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses [N], statistics of rows [3, N] and of columns [3, M] (or [3, 0]), kept products, and
    `rnorms` if normalize, else [0].

    Without metrics only the log-sum-exps of the statistics mean anything.
    """
    ways = backend(x, y)
    with no_autocast(x):
        rnorms = ways.rnorms(x, y) if normalize else None
        factors = rows.factors(x, y, scale, rnorms)
        found = ways.fwd(x, y, *factors, labels, symmetric, smoothing, offset, stored, metrics)
    return (*found, scale.new_empty(0) if rnorms is None else rnorms)


def _gradients(dloss: Tensor, x: Tensor, y: Tensor, scale: Tensor, rnorms: Tensor,
               labels: Tensor | None, row_lse: Tensor, column_lse: Tensor, kept: Tensor,
               symmetric: bool, smoothing: float, offset: int,
               ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dy and dscale."""
    scale, normalized = rows.not_zero(scale), rnorms if rnorms.shape[0] else None
    given = (labels, row_lse, column_lse, kept, symmetric, smoothing, offset)
    with no_autocast(x):
        factors = rows.factors(x, y, scale, normalized)
        dx, dy, along = backend(x, y).bwd(dloss, x, y, *factors, normalized, *given)
    return dx, dy, along.sum() / scale


losses_of = torch.library.custom_op("fastxm::info_nce_fwd", _losses, mutates_args=())
gradients_of = torch.library.custom_op("fastxm::info_nce_bwd", _gradients, mutates_args=())
gradients = gradient(gradients_of, _gradients, reference.differentiable_bwd)


@losses_of.register_fake
def _(x, y, scale, normalize, labels, symmetric, smoothing, offset, stored, metrics=True):
    (N, M), tiled = (x.shape[0], y.shape[0]), backend(x, y) is tiles and tiles.fits(x, y)
    new = scale.new_empty
    kept = tiles.kept(x, y, stored) if tiled else new(N if stored else 0, M)
    shapes = ((N,), (3, N), (3, M if symmetric else 0))
    return (*(new(shape) for shape in shapes), kept, new(N + M if normalize else 0))


@gradients_of.register_fake
def _(dloss, x, y, scale, *options):
    return tuple(t.new_empty(t.shape) for t in (x, y, scale))


def _save(ctx, inputs, output):
    x, y, scale, _, labels, *ctx.options = inputs
    ctx.save_for_backward(x, y, scale, labels, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of what is kept, which is large


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * len(ctx.needs_input_grad)
    x, y, scale, labels, row_stats, column_stats, kept, rnorms = ctx.saved_tensors
    lses, options = (row_stats[0], column_stats[0]), ctx.options[:3]  # symmetric to offset
    grads = gradients(dloss, x, y, scale, rnorms, labels, *lses, kept, *options)
    return (*grads, *(None,) * (len(ctx.options) + 2))


losses = differentiable(losses_of, _losses, _save, _backward, reference.losses)
