"""Rows packed for the tile kernels of fastxm._C: bfloat16 products with float32 accumulators.

On a CPU torch.mm gives bfloat16 back, which rounds a logit of 100 by 0.2; and what follows a
product is cheapest while a tile of it is still in the first level of the cache.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastxm import _C
from fastxm.ops.dispatch import threads

PANEL = 64  # columns of a panel
LEVEL: str = _C.gemm_level()
PACKED = {"bfloat16": (torch.bfloat16, torch.float32), "float32": (torch.float32,)}.get(LEVEL, ())


def operands(*rows: Tensor) -> tuple[Tensor, ...]:
    """The rows [.., D] as a tile kernel takes them: of one dtype, contiguous, pairs of bfloat16.

    bfloat16 stays where all have it and the machine multiplies it; else float32 (or float64).
    """
    dtype = torch.promote_types(rows[0].dtype, rows[-1].dtype)
    if dtype not in PACKED:
        dtype = torch.promote_types(dtype, torch.float32)
    odd = dtype == torch.bfloat16 and rows[0].shape[-1] % 2
    return tuple(F.pad(r.to(dtype), (0, odd)).contiguous() for r in rows)


def times(a: Tensor, y: Tensor, out: Tensor) -> None:
    """out [N, M], float32, = a yᵀ of rows a [N, D] and y [M, D] of one packed dtype, contiguous."""
    (N, D), M, half = a.shape, len(y), a.dtype == torch.bfloat16
    panels = pack(y)
    assert panels is not None
    _C.gemm_cpu(
        *(half, a.data_ptr(), D, N, panels.data_ptr(), D, M),
        *(out.data_ptr(), out.stride(0), threads()),
    )


def pack(y: Tensor) -> Tensor | None:
    """The rows of y [M, D], of `operands`, in panels; None where no tile kernel multiplies them."""
    if y.dtype not in PACKED or y.device.type != "cpu":
        return None
    M, D = y.shape
    panels = y.new_empty(-(-M // PANEL) * PANEL * D)
    half = y.dtype == torch.bfloat16
    _C.gemm_pack_cpu(half, y.data_ptr(), M, D, D, panels.data_ptr(), threads())
    return panels
