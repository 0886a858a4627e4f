"""The sigmoid loss by Triton: no logit leaves the registers. A strip of the gradients of the logits
is written, which two vendor products take on to x and y, in the dtype of the rows; in float32 for
float16, in which most of them would be 0.
"""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastxm.ops import gemm
from fastxm.ops.info_nce_triton import ROOM, STRIP


def pair_sums(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, paired: bool, gradients: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """As `siglip_pairs.pair_sums`."""
    pairs = importlib.import_module("fastxm.kernels.siglip").pairs
    (N, D), M = x.shape, len(y)
    dtype, short = torch.promote_types(x.dtype, y.dtype), -D % 16  # rows in whole vectors
    x, y = (F.pad(t.to(dtype), (0, short)) if short else t.to(dtype).contiguous() for t in (x, y))
    of_x, of_y = (t.float() if t.dtype == torch.float16 else t for t in (x, y))
    dx, dy = (scale.new_zeros(t.shape if gradients else 0) for t in (x, y))
    width = -(-M // 16) * 16
    n = max(128, min(STRIP, ROOM // max(1, width * of_x.element_size())) // 128 * 128)
    room = of_x.new_empty(min(n, N) if gradients else 0, width)[:, :M]
    total = scale.new_zeros(3, dtype=torch.float64)
    with torch.cuda.device_of(x):
        for start in range(0, N if M else 0, n):
            here = slice(start, min(start + n, N))
            g = room[: here.stop - start] if gradients else None
            offset = start if paired else M
            sums = pairs(x[here], y, scale, bias, offset, g, gemm.triton_precision())
            total[: len(sums)] += sums.sum((1, 2), dtype=torch.float64)
            if g is not None:
                gemm.multiply(g, of_y, dx[here])
                gemm.accumulate(dy, g.T, of_x[here])
    loss, dscale, dbias = (t.to(scale.dtype) for t in total)
    return loss, (
        dx[:, :D].contiguous(),
        dy[:, :D].contiguous(),
        dscale,
        dbias,
    ) if gradients else ()
