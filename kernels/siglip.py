"""The sigmoid loss of a tile of pairs, and the gradients of its logits, which vendor products take
on to x and y. Formula and letters: fastxm/ops/siglip.py. A program owns a tile.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .gemm import row_products
from .info_nce import _exp, _piece
from .info_nce_tiles import compiles, size_class, tuned


def _config(n: int, m: int, d: int, halvings: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d, "HALVINGS": halvings}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# wider tiles leave a thread no room for three sums beside its share of the products
CANDIDATES = [
    _config(128, 128, 64, 3, 8, 3),
    _config(128, 64, 64, 3, 4, 4),
    _config(64, 64, 32, 1, 4, 3),
]
CONFIGS = [_config(32, 32, 32, 1, 4, 1)] if knobs.runtime.interpret else CANDIDATES
NARROWEST = min(config.kwargs["BLOCK_M"] for config in CONFIGS)


@triton.jit(do_not_specialize=["N", "offset", "plane", "tuned_for"])
def _pairs_kernel(x, y, scale, bias, sums, g, N, M, D, offset, plane, g_stride, tuned_for,
                  GRADIENTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HALVINGS: tl.constexpr,
                  GROUP: tl.constexpr):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_M >> HALVINGS
    # neighbours in time share GROUP strips of rows: what they read of y stays in the cache
    tiles, strips = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles) * GROUP
    place, high = tl.program_id(0) % (GROUP * tiles), tl.minimum(strips - group, GROUP)
    i0, tile = (group + place % high) * BLOCK_N, place // high
    start = tile * BLOCK_M
    products = row_products(x, y, i0, start, N, M, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D)
    i = i0 + tl.arange(0, BLOCK_N)
    factor, shift = tl.load(scale), tl.load(bias)
    losses = tl.zeros((BLOCK_N,), tl.float32)
    dscales = tl.zeros((BLOCK_N,), tl.float32)
    dbiases = tl.zeros((BLOCK_N,), tl.float32)
    for k in tl.static_range(2**HALVINGS):
        j = start + k * WIDTH + tl.arange(0, WIDTH)
        piece = _piece(products, k, HALVINGS)
        s = piece * factor + shift
        partner = (offset + i)[:, None] == j[None, :]
        here = (i < N)[:, None] & (j < M)[None, :]
        u = tl.where(partner, -s, s)  # the loss is log(1 + exp u)
        e = _exp(-tl.abs(u))
        whole = 1 + e
        # what rounding 1 + e left out is most of a small e
        loss = tl.maximum(u, 0.0) + (tl.log(whole) + (e - (whole - 1)))
        losses += tl.sum(tl.where(here, loss, 0.0), 1)
        if GRADIENTS:
            sigmoid = tl.where(u < 0, e, 1.0) / whole
            ds = tl.where(here, tl.where(partner, -sigmoid, sigmoid), 0.0)
            dscales += tl.sum(ds * piece, 1)
            dbiases += tl.sum(ds, 1)
            at = g + tl.cast(i, tl.int64)[:, None] * g_stride + j[None, :]
            tl.store(at, (factor * ds).to(g.dtype.element_ty), here)
    at = sums + tl.cast(tile, tl.int64) * N + i
    tl.store(at, losses, i < N)
    if GRADIENTS:
        tl.store(at + plane, dscales, i < N)
        tl.store(at + 2 * tl.cast(plane, tl.int64), dbiases, i < N)


_pairs = tuned(_pairs_kernel, CONFIGS, "GRADIENTS")


def pairs(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int, g: Tensor | None,
          precision: str) -> Tensor:  # fmt: skip
    """Sums of the pairs of x [N, D] and y [M, D], row i + offset of y being the partner of row i.

    Args:
        scale, bias: scalars, float32.
        offset: M or more, and no row has a partner.
        g: [N, M], where scale times the gradients of the logits are written, or None.

    Returns:
        [3 or 1, parts, N]: of the loss, and with g of ds times the product and of ds.
    """
    (N, D), M, launched = x.shape, len(y), {}
    sums = x.new_empty(1 if g is None else 3, triton.cdiv(M, NARROWEST), N, dtype=scale.dtype)

    def grid(tile: dict) -> tuple[int]:
        launched.update(tile)
        return (triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(M, tile["BLOCK_M"]),)

    _pairs[grid](
        x, y, scale, bias, sums, x if g is None else g, N, M, D, offset, sums.stride(0),
        0 if g is None else g.stride(0), size_class(N, M, D), g is not None, precision, GROUP=8,
    )  # fmt: skip
    return sums[:, : triton.cdiv(M, launched["BLOCK_M"])]


COMPILES = compiles(_pairs_kernel, CANDIDATES)
