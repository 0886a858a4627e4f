"""InfoNCE as one op of PyTorch: which backend runs, what is kept, and autograd."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastxm.ops import dispatch
from fastxm.ops import info_nce_cuda as cuda
from fastxm.ops import info_nce_reference as reference
from fastxm.ops import info_nce_tiles as tiles
from fastxm.ops import info_nce_triton as triton
from fastxm.ops.eager import eager

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
    size = len(x) * len(y) * itemsize
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


def rnorm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What makes the rows of x [N, D] unit rows, rsqrt(max(sum x^2, 1e-12)): [N], of a dtype."""
    return x.to(dtype).square().sum(-1).clamp_min(1e-12).rsqrt()


def _losses(x: Tensor, y: Tensor, a: Tensor, b: Tensor, labels: Tensor | None, symmetric: bool,
            smoothing: float, offset: int, stored: bool, metrics: bool = True,
            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses [N], statistics of rows [3, N] and of columns [3, M] (or [3, 0]), kept products.

    Without metrics only the log-sum-exps of the statistics mean anything.
    """
    given = (x, y, a, b, labels, symmetric, smoothing, offset, stored, metrics)
    return _without_autocast(backend(x, y).fwd, x.device.type, given)


def _gradients(dloss: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor, labels: Tensor | None,
         row_lse: Tensor, column_lse: Tensor, kept: Tensor, symmetric: bool, smoothing: float,
         offset: int, of_b: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dy, da, and db or, unless it is wanted, an empty tensor."""
    given = (dloss, x, y, a, b, labels, row_lse, column_lse, kept, symmetric, smoothing, offset)
    return _without_autocast(backend(x, y).bwd, x.device.type, (*given, of_b))


def _without_autocast(f: Callable[..., Any], device: str, given: tuple) -> Any:
    if not torch.is_autocast_enabled(device):
        return f(*given)
    with torch.autocast(device, enabled=False):
        return f(*given)


losses_of = torch.library.custom_op("fastxm::info_nce_fwd", _losses, mutates_args=())
gradients_of = torch.library.custom_op("fastxm::info_nce_bwd", _gradients, mutates_args=())


@losses_of.register_fake
def _(x, y, a, b, labels, symmetric, smoothing, offset, stored, metrics=True):
    (N, M), tiled = (len(x), len(y)), backend(x, y) is tiles and tiles.fits(x, y)
    kept = tiles.kept(x, y, stored) if tiled else a.new_empty(N if stored else 0, M)
    shapes = ((N,), (3, N), (3, M if symmetric else 0))
    return (*(a.new_empty(shape) for shape in shapes), kept)


@gradients_of.register_fake
def _(dloss, x, y, a, b, *options):
    *_, of_b = options
    return (*(t.new_empty(t.shape) for t in (x, y, a)), b.new_empty(len(b) if of_b else 0))


def _save(ctx, inputs, output):
    x, y, a, b, labels, *ctx.options = inputs
    _, row_stats, column_stats, kept = output
    ctx.save_for_backward(x, y, a, b, labels, row_stats, column_stats, kept)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of what is kept, which is large


def _backward(ctx, dloss, *_, gradients=gradients_of):
    if dloss is None:
        return (None,) * len(ctx.needs_input_grad)
    *inputs, row_stats, column_stats, kept = ctx.saved_tensors
    *options, _stored, _metrics = ctx.options
    of_b = ctx.needs_input_grad[3]
    if torch.is_grad_enabled():
        grads = reference.differentiable_bwd(dloss, *inputs, *options)
    else:
        lses = row_stats[0], column_stats[0]
        *grads, db = gradients(dloss, *inputs, *lses, kept, *options, of_b)
        grads.append(db if of_b else None)
    return (*grads, *(None,) * (len(ctx.options) + 1))


losses_of.register_autograd(_backward, setup_context=_save)


# losses_of, without what its registration costs where PyTorch does not trace or transform it
losses = eager(losses_of, _losses, _save, partial(_backward, gradients=_gradients))
