"""Products of matrices, of which only the device may know how many rows they have, or how many they
sum over; and what kernels that begin with a product share: tiles, and how they are chosen.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

NEITHER, ROWS, DEPTH = 0, 1, 2  # of a product: what only the device counts
_ROWS, _DEPTH = tl.constexpr(ROWS), tl.constexpr(DEPTH)


@triton.jit
def multiply(a, b, M, N, D, a_m, a_d, b_d, b_n, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # a [M, D] b [D, N], as far as there are; a takes the dtype of b
    d = tl.arange(0, BLOCK_D)
    of_m, of_n = tl.arange(0, BLOCK_M) < M, tl.arange(0, BLOCK_N) < N
    a += tl.arange(0, BLOCK_M)[:, None] * a_m + d[None, :] * a_d
    b += d[:, None] * b_d + tl.arange(0, BLOCK_N)[None, :] * b_n
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        p = tl.load(a, of_m[:, None] & (d < D - start)[None, :], other=0.0)
        q = tl.load(b, (d < D - start)[:, None] & of_n[None, :], other=0.0)
        products = tl.dot(p.to(q.dtype), q, products, input_precision=PRECISION)
        a += BLOCK_D * a_d
        b += BLOCK_D * b_d
    return products


@triton.jit
def row_products(x, y, i0, j0, N, M, D, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # <x[i], y[j]> from i0 and j0; past the end the last row comes again, for callers to leave out
    d = tl.arange(0, BLOCK_D)
    p_at = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - i0)[:, None] * D + d[None, :]
    q_at = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - j0)[None, :] * D + d[:, None]
    x += tl.cast(i0, tl.int64) * D
    y += tl.cast(j0, tl.int64) * D
    products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        p = tl.load(x + p_at, (d < D - start)[None, :], other=0.0)
        q = tl.load(y + q_at, (d < D - start)[:, None], other=0.0)
        products = tl.dot(p, q, products, input_precision=PRECISION)
        x += BLOCK_D
        y += BLOCK_D
    return products


@triton.jit(do_not_specialize=["tuned_for"])
def _product_kernel(a, b, out, count, M, N, D, a_batch, a_m, a_d, b_batch, b_d, b_n, out_batch,
                    out_m, tuned_for, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    # a program owns a tile of out [batch, M, N]
    high, wide = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    batch, tile = tl.program_id(0) // (high * wide), tl.program_id(0) % (high * wide)
    m0, n0 = tile // wide * BLOCK_M, tile % wide * BLOCK_N
    if COUNTED == _ROWS:
        M = tl.load(count)
    if COUNTED == _DEPTH:
        D = tl.load(count)
    if m0 >= M:
        return
    a += tl.cast(batch, tl.int64) * a_batch + tl.cast(m0, tl.int64) * a_m
    b += tl.cast(batch, tl.int64) * b_batch + tl.cast(n0, tl.int64) * b_n
    products = multiply(a, b, M - m0, N - n0, D, a_m, a_d, b_d, b_n, PRECISION, BLOCK_M, BLOCK_N,
                        BLOCK_D)  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    out += tl.cast(batch, tl.int64) * out_batch + tl.cast(m0, tl.int64) * out_m + n0
    here = (m < M - m0)[:, None] & (n < N - n0)[None, :]
    tl.store(out + m[:, None] * out_m + n[None, :], products.to(out.dtype.element_ty), here)


def _config(m: int, n: int, d: int, warps: int, stages: int) -> triton.Config:
    return triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, num_warps=warps, num_stages=stages
    )


CANDIDATES = [
    _config(128, 128, 64, 8, 3),
    _config(128, 64, 64, 4, 3),
    _config(64, 128, 64, 4, 3),
    _config(64, 64, 64, 4, 4),
    _config(128, 64, 32, 8, 3),
    _config(64, 64, 32, 4, 3),
]
WIDE = _config(128, 256, 64, 8, 3)  # of halves on Hopper: leaves no room for what follows a product
CONFIGS = [_config(64, 64, 64, 4, 1)] if knobs.runtime.interpret else CANDIDATES


def _fits(config: triton.Config, itemsize: int, arch: int) -> bool:
    # a tile's rows are 128 bytes long, and so are fetched whole; operands of float32 stand in
    # registers in three parts: room for fewer sums a thread, beside what follows a product; tiles
    # of four warps spill on sm_100
    tile = config.kwargs
    if config is WIDE:
        return itemsize == 2 and arch == 90
    held = tile["BLOCK_M"] * tile["BLOCK_N"] // (32 * config.num_warps)
    room = held <= 128 // itemsize and (arch < 100 or config.num_warps == 8)
    return room and tile["BLOCK_D"] * itemsize == 128


def _fitting(configs: list[triton.Config], arguments: dict, **_) -> list[triton.Config]:
    b = arguments["b"]
    major, minor = torch.cuda.get_device_capability(b.device)
    return [c for c in configs if _fits(c, b.element_size(), 10 * major + minor)]


def tuned(kernel: triton.JITFunction, *keys: str, wide: bool = False) -> triton.runtime.Autotuner:
    # what the tiles are chosen by, beside dtypes; choices are kept on disk
    return triton.autotune(
        [*CONFIGS, *([WIDE] if wide and CONFIGS is CANDIDATES else [])],
        ["tuned_for", "PRECISION", *keys],
        prune_configs_by={"early_config_prune": _fitting}, cache_results=True,
        do_bench=partial(triton.testing.do_bench, warmup=5, rep=20),
    )(kernel)  # fmt: skip


_product = tuned(_product_kernel, "COUNTED", wide=True)


def size_class(size: int, D: int) -> int:
    # problems of about one size share their tiles
    return 100 * (D - 1).bit_length() + size.bit_length() // 3


def product(a: Tensor, b: Tensor, out: Tensor, count: Tensor, counted: int, precision: str) -> None:
    """Writes out [B, M, N] = a [B, M, D] b [B, D, N]; M or D may be less, `count` on the device."""
    (batches, M, N), D = out.shape, a.shape[2]
    _product[lambda tile: (batches * triton.cdiv(M, tile["BLOCK_M"])
                           * triton.cdiv(N, tile["BLOCK_N"]),)](
        a, b, out, count, M, N, D, *a.stride(), *b.stride(), *out.stride()[:2],
        size_class(batches * M * N, D), counted, precision,
    )  # fmt: skip


def variants(*more: triton.Config) -> list[tuple[str, str, dict, dict]]:
    """The types, precisions and tiles that kernels with a product are compiled for, and options."""
    built = []
    for element, itemsize, precision in (("*bf16:16", 2, "ieee"), ("*fp32:16", 4, "tf32x3")):
        for tile in (*CANDIDATES, *more):
            archs = [arch for arch in (80, 90, 100) if _fits(tile, itemsize, arch)]
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "archs": archs}
            if archs:
                built.append((element, precision, tile.kwargs, options))
    return built


def compiled(kernel: triton.JITFunction, types: dict, constants: dict, options: dict) -> tuple:
    """A row of COMPILES: i32 where no type is given, and of constants those that a kernel has."""
    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    left = [name for name in kernel.arg_names if name not in fixed]
    return kernel, {name: types.get(name, "i32") for name in left}, fixed, options


def _compiles() -> list:
    rows = []
    strides = ("a_batch", "a_m", "a_d", "b_batch", "b_d", "b_n", "out_batch", "out_m")
    for element, precision, tile, options in variants(WIDE):
        types = {"a": element, "b": element, "out": "*fp32:16", "count": "*i64"}
        types |= dict.fromkeys(("M", "N", "D", *strides), "i32:16")
        # rows by rows, rows by columns, columns by columns
        for counted, ones in ((ROWS, ("a_d", "b_d")), (ROWS, ("a_d", "b_n")),
                              (DEPTH, ("a_m", "b_n"))):  # fmt: skip
            constants = {"PRECISION": precision, "COUNTED": counted, **tile}
            constants |= dict.fromkeys(ones, 1)
            rows.append(compiled(_product_kernel, types, constants, options))
        if element == "*bf16:16":  # of two kinds of halves
            mixed = {**types, "a": "*fp16:16", "out": element}
            rows.append(compiled(_product_kernel, mixed, constants, options))
    return rows


COMPILES = _compiles()
