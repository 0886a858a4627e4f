"""Region-word scores in kernels that end in registers what a matrix product begins. Formula and
letters: fastxm/ops/region_word.py.

The words of all texts stand one after the other, and only the device knows how many they are: of K
places, programs beyond the words have nothing to do. What is made of P pictures at a time are
strips [K, P, width], of a number for each word and region; width is R, rounded up to a multiple of
16. The products s = <r, w> and the gradients of regions and words are by kernels/gemm.py.

columns    the softmax over the words of a text: top and 1 / sum exp(s - top) for each region
rows       that over regions, after the one over words if there is: a strip of alpha; <w, c>
square     |c|^2 = sum_r alpha h with h = alpha (r rᵀ), or of the contexts c = alpha r themselves
gradient   strips of ds, or of what goes on through the softmax over words, and of 2 alpha d|c|^2
through    the strip of ds behind the softmax over words
"""

import triton
import triton.language as tl
from torch import Tensor

from .gemm import compiled, multiply, size_class, tuned, variants


@triton.jit
def _columns_kernel(s, starts, columns, texts, stride, BLOCK: tl.constexpr):
    # a program owns BLOCK columns of a text
    text, blocks = tl.program_id(0) % texts, tl.program_id(0) // texts
    q = blocks * BLOCK + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(tl.load(starts + text), tl.load(starts + text + 1)):
        x = tl.load(s + tl.cast(k, tl.int64) * stride + q, q < stride, other=0.0)
        before, top = top, tl.maximum(top, x)
        total = total * tl.exp(before - top) + tl.exp(x - top)
    columns += tl.cast(text, tl.int64) * stride + q
    tl.store(columns, top, q < stride)
    tl.store(columns + tl.cast(texts, tl.int64) * stride, 1 / total, q < stride)


@triton.jit
def _beta(s, columns, plane, here, WORD_SOFTMAX: tl.constexpr):
    # s, and the softmax of it over words, or s again
    s = tl.load(s, here, other=0.0)
    beta = s
    if WORD_SOFTMAX:
        beta = tl.exp(s - tl.load(columns, here, other=0.0))
        beta *= tl.load(columns + plane, here, other=0.0)
    return s, beta


@triton.jit
def _rows_kernel(s, alpha, dots, count, text, columns, texts, K, R, width, stride, sharp,
                 WORD_SOFTMAX: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):  # fmt: skip
    # a program owns BLOCK_M words on a picture
    blocks = tl.cdiv(K, BLOCK_M)
    picture, k0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    k, r = k0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    of_k = k < tl.load(count)
    if k0 >= tl.load(count):
        return
    at = tl.cast(k, tl.int64)[:, None] * stride + picture * width + r[None, :]
    plane = tl.cast(texts, tl.int64) * stride
    if WORD_SOFTMAX:
        of_text = tl.cast(tl.load(text + k, of_k, other=0), tl.int64)
        columns += of_text[:, None] * stride + picture * width + r[None, :]
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for r0 in range(0, R, BLOCK_N):
        here = of_k[:, None] & (r < R - r0)[None, :]
        x, beta = _beta(s + at + r0, columns + r0, plane, here, WORD_SOFTMAX)
        z = tl.where((r < R - r0)[None, :], sharp * beta, -float("inf"))
        before, top = top, tl.maximum(top, tl.max(z, 1))
        e, less = tl.exp(z - top[:, None]), tl.exp(before - top)
        total = total * less + tl.sum(e, 1)
        dot = dot * less + tl.sum(e * x, 1)
    tl.store(dots + tl.cast(picture, tl.int64) * K + k, dot / total, of_k)
    scale = 1 / total
    for r0 in range(0, width, BLOCK_N):
        here = of_k[:, None] & (r < R - r0)[None, :]
        _, beta = _beta(s + at + r0, columns + r0, plane, here, WORD_SOFTMAX)
        e = tl.exp(sharp * beta - top[:, None]) * scale[:, None]
        e = tl.where((r < R - r0)[None, :], e, 0.0).to(alpha.dtype.element_ty)
        tl.store(alpha + at + r0, e, of_k[:, None] & (r < width - r0)[None, :])


@triton.jit(do_not_specialize=["tuned_for"])
def _square_kernel(alpha, b, contexts, squares, count, K, N, width, stride, contexts_k, tuned_for,
                   GRAM: tl.constexpr, AGAIN: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr):  # fmt: skip
    # a program owns BLOCK_M words on a picture; b [P, width, N] is r rᵀ or r
    blocks = tl.cdiv(K, BLOCK_M)
    picture, k0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    words = tl.load(count) - k0
    if words <= 0:
        return
    k, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    squares += tl.cast(picture, tl.int64) * K + k0 + k
    if AGAIN and GRAM:  # unless the forward left them; NaN says that it did not
        known = tl.load(squares, k < words, other=0.0)
        if tl.sum((known != known).to(tl.int32)) == 0:
            return
    alpha += tl.cast(k0, tl.int64) * stride + picture * width
    b += tl.cast(picture, tl.int64) * width * N
    contexts += tl.cast(k0, tl.int64) * contexts_k + picture * N
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        h = multiply(alpha, b + n0, words, N - n0, width, stride, 1, N, 1, PRECISION, BLOCK_M,
                      BLOCK_N, BLOCK_D)  # fmt: skip
        here = (k < words)[:, None] & (n < N - n0)[None, :]
        if GRAM:
            own = tl.load(alpha + k[:, None] * stride + n0 + n[None, :], here, other=0.0)
            total += tl.sum(h * own.to(tl.float32), 1)
        else:
            at = contexts + k[:, None] * contexts_k + n0 + n[None, :]
            tl.store(at, h.to(contexts.dtype.element_ty), here)
            total += tl.sum(h * h, 1)
    tl.store(squares, total, k < words)


@triton.jit(do_not_specialize=["tuned_for"])
def _gradient_kernel(a, b, s, alpha, dots, squares, ddots, dsquares, ds, twice, count, K, D, width,
                     stride, a_batch, a_m, sharp, tuned_for, WORD_SOFTMAX: tl.constexpr,
                     PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_D: tl.constexpr):  # fmt: skip
    # a program owns a tile of a picture: h = a bᵀ of a [K, P, D], alpha or contexts, and
    # b [P, width, D], r rᵀ or r; its rows have d<w, c> and d|c|^2
    high, wide = tl.cdiv(K, BLOCK_M), tl.cdiv(width, BLOCK_N)
    picture, tile = tl.program_id(0) // (high * wide), tl.program_id(0) % (high * wide)
    k0, n0 = tile // wide * BLOCK_M, tile % wide * BLOCK_N
    words = tl.load(count) - k0
    if words <= 0:
        return
    a += tl.cast(k0, tl.int64) * a_m + picture * a_batch
    b += (tl.cast(picture, tl.int64) * width + n0) * D
    h = multiply(a, b, words, width - n0, D, a_m, 1, 1, D, PRECISION, BLOCK_M, BLOCK_N,
                  BLOCK_D)  # fmt: skip
    k, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row, of_k = tl.cast(picture, tl.int64) * K + k0 + k, k < words
    ddot = tl.load(ddots + row, of_k, other=0.0)
    twice_dsquare = 2 * tl.load(dsquares + row, of_k, other=0.0)
    # sum_r alpha (ddot s + 2 dsquare h)
    inner = ddot * tl.load(dots + row, of_k, other=0.0)
    inner += twice_dsquare * tl.load(squares + row, of_k, other=0.0)
    here = of_k[:, None] & (n < width - n0)[None, :]
    start = tl.cast(k0, tl.int64) * stride + picture * width + n0
    at = k[:, None] * stride + n[None, :]
    g = twice_dsquare[:, None] * h - inner[:, None]
    g += ddot[:, None] * tl.load(s + start + at, here, other=0.0)
    own = tl.load(alpha + start + at, here, other=0.0).to(tl.float32)
    result = sharp * g
    if not WORD_SOFTMAX:
        result += ddot[:, None]
    tl.store(ds + start + at, (own * result).to(ds.dtype.element_ty), here)
    tl.store(twice + start + at, (twice_dsquare[:, None] * own).to(twice.dtype.element_ty), here)


@triton.jit
def _through_kernel(s, alpha, g, ds, ddots, starts, columns, texts, K, width, stride,
                    BLOCK: tl.constexpr):  # fmt: skip
    # a program owns BLOCK columns of a text
    text, blocks = tl.program_id(0) % texts, tl.program_id(0) // texts
    q = blocks * BLOCK + tl.arange(0, BLOCK)
    here, picture = q < stride, tl.cast(q // width, tl.int64)
    columns += tl.cast(text, tl.int64) * stride + q
    top = tl.load(columns, here, other=0.0)
    scale = tl.load(columns + tl.cast(texts, tl.int64) * stride, here, other=0.0)
    begin, end = tl.load(starts + text), tl.load(starts + text + 1)
    inner = tl.zeros((BLOCK,), tl.float32)
    for k in range(begin, end):
        at = tl.cast(k, tl.int64) * stride + q
        beta = tl.exp(tl.load(s + at, here, other=0.0) - top) * scale
        inner += beta * tl.load(g + at, here, other=0.0)
    for k in range(begin, end):
        at = tl.cast(k, tl.int64) * stride + q
        beta = tl.exp(tl.load(s + at, here, other=0.0) - top) * scale
        ddot = tl.load(ddots + picture * K + k, here, other=0.0)
        x = ddot * tl.load(alpha + at, here, other=0.0).to(tl.float32)
        x += beta * (tl.load(g + at, here, other=0.0) - inner)
        tl.store(ds + at, x.to(ds.dtype.element_ty), here)


BLOCK = 256  # columns of a text that a program owns


# AGAIN is no key: the forward, which multiplies, comes first and chooses
_square = tuned(_square_kernel, "GRAM")
_gradient = tuned(_gradient_kernel, "WORD_SOFTMAX")


def columns(s: Tensor, starts: Tensor) -> Tensor:
    """Top and scale [2, texts, P, width] of each text's words, of s [K, P, width]."""
    (_, P, width), texts = s.shape, len(starts) - 1
    found = s.new_empty(2, texts, P, width)
    grid = (texts * triton.cdiv(P * width, BLOCK),)
    _columns_kernel[grid](s, starts, found, texts, P * width, BLOCK)
    return found


def rows(s: Tensor, alpha: Tensor, dots: Tensor, count: Tensor, text: Tensor,
         over_words: Tensor | None, R: int, sharp: float) -> None:  # fmt: skip
    """Writes alpha [K, P, width] and dots [P, K]; text [K]: of each word."""
    K, P, width = s.shape
    texts = 0 if over_words is None else over_words.shape[1]
    grid = (P * triton.cdiv(K, 16),)
    _rows_kernel[grid](
        s, alpha, dots, count, text, s if over_words is None else over_words, texts, K, R, width,
        P * width, sharp, over_words is not None, BLOCK_M=16, BLOCK_N=128,
    )  # fmt: skip


def square(alpha: Tensor, b: Tensor, contexts: Tensor | None, squares: Tensor, count: Tensor,
           again: bool, precision: str) -> None:  # fmt: skip
    """Writes squares [P, K], and contexts [K, P, D] unless b is r rᵀ.

    again: squares may be there already, or NaN.
    """
    (K, P, width), N, gram = alpha.shape, b.shape[2], contexts is None
    _square[lambda tile: (P * triton.cdiv(K, tile["BLOCK_M"]),)](
        alpha, b, alpha if contexts is None else contexts, squares, count, K, N, width, P * width,
        P * N, size_class(K * P * N, width), gram, again, precision,
    )  # fmt: skip


def gradient(a: Tensor, b: Tensor, s: Tensor, alpha: Tensor, tables: tuple[Tensor, ...], ds: Tensor,
             twice: Tensor, count: Tensor, sharp: float, word_softmax: bool,
             precision: str) -> None:  # fmt: skip
    """Writes ds (or g) and twice [K, P, width]; tables [P, K]: <w, c>, |c|^2, their gradients."""
    (K, P, width), D = s.shape, a.shape[2]
    _gradient[lambda tile: (P * triton.cdiv(K, tile["BLOCK_M"])
                            * triton.cdiv(width, tile["BLOCK_N"]),)](
        a, b, s, alpha, *tables, ds, twice, count, K, D, width, P * width, a.stride(1), a.stride(0),
        sharp, size_class(K * P * width, D), word_softmax, precision,
    )  # fmt: skip


def through(s: Tensor, alpha: Tensor, g: Tensor, ds: Tensor, ddots: Tensor, starts: Tensor,
            over_words: Tensor) -> None:  # fmt: skip
    """Writes ds from g, which may be the same."""
    (K, P, width), texts = s.shape, len(starts) - 1
    grid = (texts * triton.cdiv(P * width, BLOCK),)
    _through_kernel[grid](
        s, alpha, g, ds, ddots, starts, over_words, texts, K, width, P * width, BLOCK
    )


def _compiles() -> list:
    rows = []
    types = {"text": "*i64:16", "starts": "*i64:16", "count": "*i64", "sharp": "fp32"}
    tables = ("s", "columns", "dots", "squares", "ddots", "dsquares", "g")
    types |= dict.fromkeys(tables, "*fp32:16")
    types |= dict.fromkeys(("N", "D", "width", "stride", "contexts_k", "a_batch", "a_m"), "i32:16")
    strips = ("a", "b", "alpha", "contexts", "ds", "twice")
    for element, precision, tile, options in variants():
        for gram in (True, False):
            constants = {"PRECISION": precision, "GRAM": gram, "AGAIN": gram, **tile}
            types |= dict.fromkeys(strips, element)
            if gram and element == "*bf16:16":
                types |= dict.fromkeys(("a", "b", "alpha"), "*fp16:16")
            rows.append(compiled(_square_kernel, types, constants, options))
            # of halves the softmax over words has contexts
            softmax = {"WORD_SOFTMAX": not gram}
            rows.append(compiled(_gradient_kernel, types, {**constants, **softmax}, options))
    plain = {"num_warps": 4, "num_stages": 3}
    for softmax in (False, True):
        tile = {"BLOCK_M": 16, "BLOCK_N": 128, "WORD_SOFTMAX": softmax}
        rows.append(compiled(_rows_kernel, {**types, "alpha": "*bf16:16"}, tile, plain))
    by_text = (_columns_kernel, _through_kernel)
    return [*rows, *(compiled(kernel, types, {"BLOCK": BLOCK}, plain) for kernel in by_text)]


COMPILES = _compiles()
