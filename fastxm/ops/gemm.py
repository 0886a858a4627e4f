"""Matrix products with float32 accumulators and results, of the vendor's or of our own.

On a CPU torch.mm gives bfloat16 back, which rounds a logit of 100 by 0.2; and what follows a
product is cheapest while a tile of it is still in the first level of the cache: so there rows are
packed for the tile kernels of fastxm._C. On a GPU torch.mm gives float32 of halves.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastxm import _C
from fastxm.ops.dispatch import threads

PANEL = 64  # columns of a panel
LEVEL: str = _C.gemm_level()
PACKED = {"bfloat16": (torch.bfloat16, torch.float32), "float32": (torch.float32,)}.get(LEVEL, ())
HALVES = (torch.bfloat16, torch.float16)


def stream(x: Tensor) -> int | None:
    """The stream that CUDA kernels over x go to, None where x is on no GPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def operands(*rows: Tensor) -> tuple[Tensor, ...]:
    """The rows [.., D] as products take them: of one dtype, contiguous, 4 or 16 bytes long.

    Halves stay where all are of one kind and the machine multiplies them; else float32 (float64).
    """
    dtype = torch.promote_types(rows[0].dtype, rows[-1].dtype)
    cuda = rows[0].is_cuda
    if dtype not in (HALVES if cuda else PACKED):
        dtype = torch.promote_types(dtype, torch.float32)
    short = -rows[0].shape[-1] % (8 if cuda else 2) if dtype in HALVES else 0
    rows = tuple(r.to(dtype).contiguous() for r in rows)
    return tuple(F.pad(r, (0, short)) for r in rows) if short else rows


def multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out [.., N, M] = x [.., N, D] y [.., D, M], all matrices or all batches of them.

    In the dtype of out: x's, or float32 of halves, which a CPU widens first.
    """
    product = torch.mm if x.ndim == 2 else torch.bmm
    if x.dtype != out.dtype and x.is_cuda:
        product(x, y, out_dtype=out.dtype, out=out)
    else:
        product(x.to(out.dtype), y.to(out.dtype), out=out)


def accumulate(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out [N, M] += x [N, D] y [D, M], as near to float32 as the vendor's product comes."""
    if x.dtype == out.dtype:
        out.addmm_(x, y)
    elif x.is_cuda:  # torch 2.9 cannot add float32 to a product of halves
        out += torch.mm(x, y, out_dtype=out.dtype)
    else:
        out += torch.mm(x, y)


def triton_precision() -> str:
    """Of float32 products by Triton: tf32 where the user allows it, else sums of three of them."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def pack(y: Tensor, depth: bool = False) -> Tensor | None:
    """The rows of y [M, D], of `operands`, as columns of panels, or as their depth; None where no
    tile kernel multiplies them."""
    if y.dtype not in PACKED or y.device.type != "cpu":
        return None
    M, D = y.shape
    half = y.dtype == torch.bfloat16
    columns, steps = (D, M + (half and M % 2)) if depth else (M, D)
    panels = y.new_empty(-(-columns // PANEL) * PANEL * steps)
    make = _C.gemm_pack_rows_cpu if depth else _C.gemm_pack_cpu
    make(half, y.data_ptr(), M, D, D, panels.data_ptr(), threads())
    return panels
