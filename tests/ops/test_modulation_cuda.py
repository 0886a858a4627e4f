"""The CUDA kernels of modulation: from their own source on the CPU, and on a GPU."""

import ctypes
from functools import partial

import pytest
import torch
from check import WHERE, emulated, gradient, no_worse
from formulas import modulation_formula as formula
from test_modulation import DTYPES, NORMS, SHAPES, inputs, with_norm

from fastxm.ops import backend, gemm, modulation
from fastxm.ops import modulation_passes as passes

# beside those: planes of a warp and of several blocks, cells of a row of threads and of less than
# a vector, channels of several blocks, and sums in parts
WIDE = [(2, 3, 4, 4, 8), (1, 1, 1, 64, 32), (1, 2, 2, 300, 1), (1, 1030, 1, 2, 2), (1, 40, 2, 3, 6)]


class Emulated:
    """The function of fastxm._C for a GPU, over the CPU's memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.seed, self.library = library.seed, library
        self.seed.argtypes = [ctypes.c_uint64]

    def modulation_cuda(self, step, sizes, addresses, stream):
        sizes, addresses = (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_uint64 * 11)(*addresses)
        self.library.run(step, sizes, addresses)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return Emulated(emulated("modulation", tmp_path_factory.mktemp("native")))


@pytest.fixture(params=WHERE)
def on(request, monkeypatch, native):
    if request.param == "gpu":
        with backend("cuda"):
            yield "cuda"
        return
    fused = passes.Fused("cuda")
    monkeypatch.setattr(passes, "_C", native)
    monkeypatch.setattr(passes, "Fused", lambda name: fused)
    monkeypatch.setattr(gemm, "stream", lambda x: 0)
    yield "cpu"


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_forward_and_backward(shape, norm, last, on):
    maps = inputs(shape, on, last=last)
    no_worse(with_norm(modulation, norm), with_norm(formula, norm), *maps)
    ours, plain = (gradient(with_norm(f, norm), (0, 1, 2)) for f in (modulation, formula))
    no_worse(ours, plain, *maps)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtypes", [*DTYPES, (torch.float16,) * 2], ids=str)
@pytest.mark.parametrize("shape", [(3, 19, 2, 3, 4), (2, 16, 2, 2, 8)], ids=str)
def test_dtypes(shape, dtypes, last, on):
    maps = inputs(shape, on, *dtypes, last=last)
    no_worse(modulation, formula, *maps)
    no_worse(gradient(modulation, (0, 1, 2)), gradient(formula, (0, 1, 2)), *maps)


@pytest.mark.parametrize("last", [False, True])
def test_float64(last, on):
    maps = [t.double() for t in inputs((2, 6, 2, 3, 4), on, last=last)]
    close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
    close(modulation(*maps), formula(*maps))
    close(gradient(modulation, (0, 1, 2))(*maps), gradient(formula, (0, 1, 2))(*maps))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 2, 2, 32), (1, 2, 1, 1, 96)], ids=str)
def test_no_barrier_is_missing(shape, last, on, native):
    """The bits are the same in whatever order the threads run."""
    maps, found = inputs(shape, on, last=last), []
    for seed in (0, 1, 2):
        native.seed(seed)
        found.append([modulation(*maps), *gradient(modulation, (0, 1, 2))(*maps)])
    native.seed(0)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
