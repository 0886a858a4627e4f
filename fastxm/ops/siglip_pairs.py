"""The sigmoid loss of all pairs of two sets of rows, by blocks of rows. Formula: siglip.py."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastxm import _C
from fastxm.ops import dispatch, gemm, siglip_triton
from fastxm.ops.dispatch import threads, wide
from fastxm.ops.vjp import vjp

BLOCK = 16 << 20  # bytes of a block of logits, or of their gradients


def backend(x: Tensor, scale: Tensor) -> str:
    """C++ on a CPU, Triton on a GPU; of float64 there the blocks of plain PyTorch. scale: wide."""
    offered = ["reference", "cpu", *(["triton"] if scale.dtype == torch.float32 else [])]
    auto = "cpu" if x.device.type == "cpu" else "reference"
    if x.is_cuda and "triton" in offered and not dispatch.missing("triton"):
        auto = "triton"
    return dispatch.choose("siglip", x.device, auto, offered)


def pair_sums(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, paired: bool, gradients: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """The sum over all pairs of rows x [N, D] and y [M, D], and its gradients to the four, or none.

    paired: whether the rows are each other's partners; else all pairs are negatives.
    """
    name = backend(x, scale)
    if name == "triton":
        return siglip_triton.pair_sums(x, y, scale, bias, paired, gradients)
    if name == "cpu" and x.numel() and y.numel():
        given = gemm.operands(x, y)
        if given[0].dtype in gemm.PACKED:
            return _tiles(given[0], given[1], x.shape[1], scale, bias, paired, gradients)
    loss, dscale, dbias = (torch.zeros_like(scale) for _ in range(3))
    x, y = wide(x, y)
    dx, dy = (t.new_zeros(t.shape) if gradients else t for t in (x, y))
    rows = max(16, BLOCK // max(1, len(y) * x.itemsize))
    for i in range(0, len(x), rows):
        here = slice(i, i + rows)
        products = x[here] @ y.T
        s = products * scale + bias
        positives = s.diagonal(i)[: rows if paired else 0]
        positives.neg_()  # s is -z s from here on
        loss -= F.logsigmoid(-s).sum()
        if gradients:
            ds = s.sigmoid_()
            positives.neg_()
            dbias += ds.sum()
            dscale += products.mul_(ds).sum()
            dx[here] = ds.mul_(scale) @ y
            dy.addmm_(ds.T, x[here])
    return loss, (dx, dy, dscale, dbias) if gradients else ()


def _tiles(
    x: Tensor, y: Tensor, D: int, scale: Tensor, bias: Tensor, paired: bool, gradients: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """The same by C++, which takes what follows a product while a tile of it is in the cache; x and
    y as `gemm.operands` gives them. ds is rounded to their dtype, all else is float32."""
    block = max(16, BLOCK // (2 * len(y) * x.itemsize)) // 2 * 2  # as rows and as columns
    places = [x, gemm.pack(y)]
    if gradients:
        dx, dy = (torch.empty_like(t, dtype=scale.dtype) for t in (x, y))
        places += [gemm.pack(y, depth=True), gemm.pack(x, depth=True), dx, dy]
    sizes = (x.dtype == torch.bfloat16, len(x), len(y), x.shape[1], paired, block)
    addresses = [0 if place is None else place.data_ptr() for place in places]
    numbers = [*map(int, sizes), *addresses, *[0] * (6 - len(addresses))]
    sums = _C.siglip_cpu(numbers, float(scale), float(bias), threads())
    loss, dscale, dbias = (scale.new_tensor(s) for s in sums)
    if not gradients:
        return loss, ()
    dx, dy = (t[:, :D].contiguous() for t in (dx, dy))  # less what makes an odd D even
    return loss, (dx, dy, dscale, dbias)


def formula(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, start: int = 0) -> Tensor:
    """The sum over all pairs in plain PyTorch; row i of x matches row start + i of y."""
    x, y = wide(x, y)
    s = (x @ y.T) * scale + bias
    positive = torch.eye(len(y), dtype=torch.bool, device=x.device)[start : start + len(x)]
    return -F.logsigmoid(s.where(positive, -s)).sum()


def scaled(dloss: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the four inputs from dloss, the inputs and their gradients where dloss is 1."""
    return tuple((dloss * grad).to(t.dtype) for grad, t in zip(saved[4:], saved[:4]))


def differentiable_bwd(dloss: Tensor, *saved: Tensor) -> list[Tensor | None]:
    """The same as the formula's own, to be differentiated again."""
    return vjp(formula, saved[:4], (dloss,))
