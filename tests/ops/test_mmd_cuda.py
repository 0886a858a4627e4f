"""The CUDA kernels of mmd: from their own source on the CPU (tests/native), and on a GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from check import WHERE, emulated, gradient, no_worse, products_as_on_a_gpu
from test_mmd import (
    KERNELS,
    LADDER,
    LEARNED,
    against_the_reference,
    by_name,
    formula,
    ours,
    samples,
)

from fastxm.ops import backend, dispatch, mmd2, mmd_backends, mmd_cuda
from fastxm.ops.mmd import RBF, Polynomial

SHAPES = [(2, 3, 1), (33, 70, 65), (75, 260, 17)]  # N, M, D; one tile, and several
TILE = 72  # a chunk of rows and some


class Emulated:
    """The functions of fastxm._C for a GPU, over the CPU's memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        size = ctypes.c_int64
        self.seed, self.parts = library.seed, library.parts
        self.seed.argtypes = [ctypes.c_uint64]
        self.parts.argtypes = [ctypes.c_bool, size, size, ctypes.POINTER(size)]
        self.library = library

    def mmd_parts_cuda(self, wide, n, m):
        found = (ctypes.c_int64 * 2)()
        self.parts(wide, n, m, found)
        return list(found)

    def mmd_tile_cuda(self, kernel, tile, stream):
        self.run(self.library.tile, kernel, tile)

    def mmd_derivatives_cuda(self, kernel, tile, stream):
        self.run(self.library.derivatives, kernel, tile)

    def run(self, function, *arrays):
        function.restype = None
        function(*((ctypes.c_uint64 * len(numbers))(*numbers) for numbers in arrays))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return Emulated(emulated("mmd", tmp_path_factory.mktemp("native")))


@pytest.fixture(params=WHERE)
def on(request, monkeypatch, native):
    for name in ("cpu", "cuda"):
        monkeypatch.setitem(mmd_backends.TILE, name, TILE)
    if request.param == "gpu":
        with backend("cuda"):
            yield "cuda"
        return
    products_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(mmd_cuda, "_C", native)
    monkeypatch.setattr(mmd_backends, "SMALL", -1)
    monkeypatch.setitem(mmd_backends.MAKERS, "cpu", mmd_cuda.epilogue)
    yield "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@by_name(KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(kernel, shape, dtype, on):
    given = [t[:3] for t in samples(*shape, on, dtype)]
    no_worse(ours(kernel, "biased"), formula(kernel, "biased"), *given)
    no_worse(gradient(ours(kernel, "unbiased")), gradient(formula(kernel, "unbiased")), *given)


@by_name(KERNELS)
@pytest.mark.parametrize("estimator", ["biased", "unbiased", "u_statistic"])
def test_estimators(kernel, estimator, on):
    x, y = (t[:2] for t in samples(78, 78, 5, on, torch.float64))
    with backend("reference"):
        plain = gradient(ours(kernel, estimator))(x, y)
    torch.testing.assert_close(gradient(ours(kernel, estimator))(x, y), plain)


@by_name(LEARNED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_bandwidths(kernel, dtype, on):
    against_the_reference(kernel, *(t[0] for t in samples(75, 140, 4, on, dtype)))


def test_problems(on):
    x, y = (t[:2] for t in samples(40, 33, 5, on, torch.float64))
    together, apart = (gradient(f) for f in (lambda x, y: mmd2(x, y, LADDER),
                                             ours(LADDER, "biased")))  # fmt: skip
    torch.testing.assert_close(together(x, y), apart(x, y))


def test_same_bits_in_any_order(on, native):
    # a missing barrier would show
    x, y = (t[0] for t in samples(70, 300, 5, on))
    p = torch.tensor([0.7, 1.4], device=on)

    def results(seed):
        native.seed(seed)
        f = lambda x, y, p: mmd2(x, y, RBF(p) + Polynomial(2))  # noqa: E731
        return [f(x, y, p), *gradient(f, (0, 1, 2))(x, y, p)]

    once = results(0)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(once, results(seed)))


def test_what_is_not_finite_stays_visible(on):
    x, y = (t[0] for t in samples(9, 12, 5, on))
    x[3, 1] = torch.nan
    assert mmd2(x, y).isnan()


def test_more_parts_than_the_kernel_holds(on):
    x, y = (t[0] for t in samples(9, 12, 5, on, torch.float64))
    for kernel in (RBF(range(1, 67)), Polynomial(256, 1e-3)):
        with backend("reference"):
            plain = mmd2(x, y, kernel)
        torch.testing.assert_close(mmd2(x, y, kernel), plain)


@pytest.mark.parametrize(
    ("dtype", "derivatives", "lacking", "chosen"),
    [
        (torch.float32, False, (), "triton"),
        (torch.float32, True, (), "cuda"),
        (torch.float64, False, (), "cuda"),
        (torch.float32, False, ("triton",), "cuda"),
        (torch.float32, True, ("cuda",), "triton"),
        (torch.float64, True, ("cuda",), "reference"),
        (torch.float32, False, ("cuda", "triton"), "reference"),
    ],
)
def test_backend_on_a_gpu(dtype, derivatives, lacking, chosen, monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda name: name if name in lacking else None)
    a = SimpleNamespace(dtype=dtype, is_cuda=True, device=torch.device("cuda"))
    assert mmd_backends.backend(a, derivatives) == chosen
