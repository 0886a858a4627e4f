"""Products by tiles of AMX: their own source, with the instructions as functions."""

import ctypes
import platform

import pytest
import torch
from check import emulated

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="tiles are x86-64's")

PANEL = 64
SHAPES = [  # rows, columns, depth
    (1, 1, 2),
    (16, 16, 32),
    (24, 64, 96),  # a tile and a half
    (33, 70, 34),  # one row, one panel and one pair more
    (20, 40, 30),
    (65, 130, 514),
    (32, 64, 1090),  # parts of the depth, the last of one pair
    (3, 17, 0),
]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    library = emulated("gemm_amx", tmp_path_factory.mktemp("native"))
    library.is_right.restype = ctypes.c_bool
    size, at = ctypes.c_int64, ctypes.c_uint64
    library.multiply.argtypes = [
        at, size, at, size, size, size, size, size, at, size, ctypes.c_bool,
    ]  # fmt: skip
    return library


def panels(y: torch.Tensor) -> torch.Tensor:
    """The rows of y [M, D] as columns of panels [panels, D / 2, 64, 2]."""
    (M, D), count = y.shape, -(-len(y) // PANEL)
    padded = torch.zeros(count * PANEL, D, dtype=y.dtype)
    padded[:M] = y
    return padded.view(count, PANEL, D // 2, 2).transpose(1, 2).contiguous()


def left(a: torch.Tensor, turned: bool) -> tuple[torch.Tensor, int, int]:
    """a [N, D] among NaN, which is not read, and bytes from row to row and from pair to pair."""
    N, D = a.shape
    if turned:  # [D / 2, N + 3, 2]
        given = torch.full((D // 2, N + 3, 2), torch.nan, dtype=a.dtype)
        given[:, :N] = a.view(N, D // 2, 2).transpose(0, 1)
        return given, 4, 4 * (N + 3)
    given = torch.full((N, D + 6), torch.nan, dtype=a.dtype)
    given[:, :D] = a
    return given, 2 * (D + 6), 4


def product(native, a, y, out, first=0, add=False, turned=False) -> None:
    """out [N, M - first] = a yᵀ [N, M] from column `first` on."""
    (given, row, step), packed, (N, D) = left(a, turned), panels(y), a.shape
    native.multiply(
        *(packed.data_ptr(), D, given.data_ptr(), row, step, N, first, len(y) - first),
        *(out.data_ptr(), out.stride(0), add),
    )


def pair(N, M, D):
    return torch.randn(N, D).bfloat16(), torch.randn(M, D).bfloat16()


def test_what_a_machine_asks_itself(native):
    assert native.is_right()


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("add", [False, True], ids=["new", "added"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape, add, turned, native):
    (a, y), (N, M, _) = pair(*shape), shape
    out = torch.full((N, M + 3), 7.0)
    product(native, a, y, out, add=add, turned=turned)
    assert torch.equal(out[:, M:], torch.full((N, 3), 7.0))  # no further
    truth = a.double() @ y.double().T + 7 * add
    plain = a.float() @ y.float().T + 7 * add
    ours, theirs = ((f - truth).square().mean().sqrt() for f in (out[:, :M], plain))
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("first", [64, 128])
def test_products_from_a_panel_on(first, native):
    (a, y), parts = pair(20, 150, 66), [torch.empty(20, 150 - first) for _ in range(2)]
    product(native, a, y, parts[0], first)
    product(native, a, y[first:], parts[1])
    assert torch.equal(*parts)
