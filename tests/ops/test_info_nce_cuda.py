"""The CUDA kernels of info_nce: from their own source on the CPU (tests/native), and on a GPU."""

import ctypes

import pytest
import torch
from check import WHERE, emulated, gradient, no_worse, products_as_on_a_gpu
from test_info_nce import (
    OPTIONS,
    RECTANGLES,
    SHAPES,
    bind,
    check_scale_of_0,
    check_short_rows,
    formula,
    inputs,
)

from fastxm.ops import backend, info_nce, info_nce_op
from fastxm.ops import info_nce_blocks as blocks
from fastxm.ops import info_nce_cuda as cuda
from fastxm.ops.info_nce_sums import join

HOW = ["small", "blocks", "kept"]


class Emulated:
    """The functions of fastxm._C for a GPU, over the CPU's memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        array, size, address = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
        ends = [address, size, address]
        types = {
            "seed": [ctypes.c_uint64],
            "workspace": [size, size],
            "fwd": [array, array, *ends, address],
            "bwd": [array, array, *ends, ctypes.c_double, ctypes.c_bool, address],
            "small": [array, array, ctypes.c_double],
            "rnorms": [array, *[address] * 3],
            "finish": [array, array],
        }
        for name, arguments in types.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, None
        self.library.workspace.restype = size
        self.info_nce_workspace_cuda = self.library.workspace

    def run(self, function, sizes, addresses, *arguments):
        numbers = (ctypes.c_int64 * len(sizes))(*sizes)
        pointers = (ctypes.c_uint64 * len(addresses))(*addresses)
        function(numbers, pointers, *arguments[:-1])  # the last is the stream

    def info_nce_fwd_cuda(self, *arguments):
        self.run(self.library.fwd, *arguments)

    def info_nce_bwd_cuda(self, *arguments):
        self.run(self.library.bwd, *arguments)

    def info_nce_finish_cuda(self, *arguments):
        self.run(self.library.finish, *arguments)

    def info_nce_rnorms_cuda(self, sizes, *addresses):
        self.library.rnorms((ctypes.c_int64 * 4)(*sizes), *addresses[:-1])

    def info_nce_small_cuda(self, *arguments):
        self.run(self.library.small, *arguments)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return Emulated(emulated("info_nce", tmp_path_factory.mktemp("native")))


def emulate(monkeypatch, native):
    """Lets the CPU's tensors take the way of a GPU's."""
    products_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(blocks, "stream", lambda x: 0)
    monkeypatch.setattr(blocks, "_C", native)
    monkeypatch.setattr(cuda, "_C", native)
    monkeypatch.setitem(info_nce_op.BACKENDS, "cpu", cuda)


@pytest.fixture(params=[f"{where}-{how}" for where in WHERE for how in HOW])
def on(request, monkeypatch, native):
    where, how = request.param.split("-")
    monkeypatch.setattr(cuda, "SMALL", cuda.SMALL if how == "small" else 0)
    always = dict.fromkeys(("cpu", "cuda"), 0)
    monkeypatch.setattr(info_nce_op, "WORTH", always if how == "kept" else {})
    if how == "blocks":
        monkeypatch.setattr(blocks, "BLOCK", 4096)
        monkeypatch.setattr(blocks, "LAUNCH", 1)
    if where == "emulated":
        emulate(monkeypatch, native)
        yield "cpu"
    else:
        with backend("cuda"):
            yield "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, options, dtype, on):
    ours, plain = (bind(f, options, shape[1], on) for f in (info_nce, formula))
    no_worse(ours, plain, *inputs(*shape, on, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_backward(shape, options, dtype, on):
    ours, plain = (gradient(bind(f, options, shape[1], on)) for f in (info_nce, formula))
    no_worse(ours, plain, *inputs(*shape, on, dtype), factor=3)


@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize(("N", "M", "D", "offset"), [*RECTANGLES, (280, 520, 9, 200)])
def test_rectangles(N, M, D, offset, classes, on):
    options = {"symmetric": False, "offset": offset, "label_smoothing": 0.1}
    options |= {"labels": classes} if classes else {}
    ours, plain = (bind(f, options, M, on) for f in (info_nce, formula))
    no_worse(ours, plain, *inputs(N, M, D, on))
    no_worse(gradient(ours), gradient(plain), *inputs(N, M, D, on))


def test_derivatives(on):
    # of more rows than a block owns, and more columns than it has threads
    for N, options in ((5, OPTIONS[-1]), (270, {"label_smoothing": 0.1})):
        x, y, scale = (t.double() for t in inputs(N, N, 3, on))
        ours, plain = (gradient(bind(f, options, N, on), (0, 1, 2)) for f in (info_nce, formula))
        torch.testing.assert_close(ours(x, y, scale), plain(x, y, scale), rtol=1e-12, atol=1e-14)


def test_large_logits(on):
    x, y, _ = inputs(130, 130, 600, on)
    scale = torch.tensor(100.0, device=on)
    ours, plain = (bind(f, {}, 130, on) for f in (info_nce, formula))
    no_worse(ours, plain, x, y, scale)
    no_worse(gradient(ours), gradient(plain), x, y, scale)


def test_rows_one_by_one(on):
    check_short_rows(on)
    check_scale_of_0(on)


def test_not_a_number(on):
    x, y, scale = inputs(40, 40, 9, on)
    x[7, 3] = torch.nan
    assert info_nce(x, y, scale, reduction="none").isnan().all()
    losses = info_nce(x, y, scale, reduction="none", symmetric=False)
    assert losses.isnan().nonzero().tolist() == [[7]]


def test_no_rows(on):
    x = torch.empty(0, 4, device=on, requires_grad=True)
    y = torch.randn(3, 4, device=on, requires_grad=True)
    info_nce(x, y, 1.0, symmetric=False, reduction="sum").backward()
    assert torch.equal(y.grad, torch.zeros_like(y))


def test_same_bits_in_any_order(on, native):
    # a missing barrier would show
    x, y, scale = inputs(150, 150, 40, on)

    def results(seed):
        native.library.seed(seed)
        f = bind(info_nce, {"labels": 9, "label_smoothing": 0.1}, 150, on)
        return [f(x, y, scale), *gradient(f, (0, 1, 2))(x, y, scale)]

    once = results(0)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(once, results(seed)))


def test_parts_join(on):
    # a rank of many meets the other ranks' rows one part after the other
    x, y, _ = inputs(40, 300, 9, on)
    a, b = torch.rand(40, device=on), torch.rand(300, device=on)
    whole, columns, _ = cuda.sums(x, y, a, b, None, None, 130, False)
    parts = [(y[:150], b[:150], 130), (y[150:], b[150:], -20)]
    found = [cuda.sums(x, some, a, of, None, None, start, False) for some, of, start in parts]
    torch.testing.assert_close(join(*(rows[:5] for rows, *_ in found)), whole[:5])
    torch.testing.assert_close(torch.cat([found[0][1], found[1][1]], 1), columns)
    positives = torch.cat([found[0][0][5, :20], found[1][0][5, 20:]])
    torch.testing.assert_close(positives, whole[5])
