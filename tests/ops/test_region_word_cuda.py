"""The CUDA kernels of region_word: from their own source on the CPU, and on a GPU."""

import ctypes
from functools import partial

import pytest
import torch
from check import WHERE, emulated, gradient, no_worse, products_as_on_a_gpu
from test_region_word import FORMS, SHAPES, both, draws, inputs

from fastxm.ops import backend, gemm, region_word_scores
from fastxm.ops import region_word_blocks as blocks
from fastxm.ops import region_word_products as products


class Emulated:
    """The functions of fastxm._C for a GPU, over the CPU's memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.seed = library.seed
        self.seed.argtypes = [ctypes.c_uint64]
        flag, size, at, number = ctypes.c_bool, ctypes.c_int64, ctypes.c_uint64, ctypes.c_double
        texts, place = [at, size, size, size], [at, size]  # starts and sizes; address and stride
        types = {
            "attention": [flag, at, at, at, *texts, size, number, flag, at],
            "pool": [flag, at, at, size, *[at] * 4, *texts, number, *place, at],
            "bwd": [flag, *[at] * 8, *texts, size, number, number, flag, *place, at, at],
        }
        for name, arguments in types.items():
            address = ctypes.c_void_p.in_dll(library, name).value
            function = ctypes.CFUNCTYPE(None, *arguments)(address)
            setattr(self, f"region_word_{name}_cuda", function)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return Emulated(emulated("region_word", tmp_path_factory.mktemp("native")))


def emulate(monkeypatch, native):
    """Lets the CPU's tensors take the way of a GPU's."""

    def of(regions, words):
        half = regions.dtype == words.dtype and regions.dtype in gemm.HALVES
        wide = products.wide_dtype(regions, words)
        return products.Half(words.dtype) if half else products.Vendor(wide)

    def nothing(regions, words, keep):
        return (0, 0, 0)

    products_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(products, "of", of)
    monkeypatch.setattr(products, "tile_dtype", lambda regions, words: None)
    monkeypatch.setattr(products, "kept_shape", nothing)
    monkeypatch.setattr(blocks, "_C", native)


@pytest.fixture(params=WHERE)
def on(request, monkeypatch, native):
    monkeypatch.setattr(blocks, "BLOCK", 20_000)  # bytes: one picture, some, or all
    if request.param == "emulated":
        emulate(monkeypatch, native)
        yield "cpu"
    else:
        with backend("cuda"):
            yield "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_forward(shape, form, dtype, on):
    no_worse(*both(form), *draws(*shape, on, dtype), of_draws=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS[1:], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[3]], ids=str)
def test_backward(shape, form, dtype, on):
    no_worse(*both(form, gradient), *draws(*shape, on, dtype), of_draws=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_derivatives(form, on):
    regions, words, lengths = inputs(2, 4, 3, 3, 4, on, torch.float64)
    leaves = [regions.requires_grad_(), words.requires_grad_()]
    f = lambda r, w: region_word_scores(r, w, lengths, **form)  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves)
    # more words than a block has warps, more regions than it has threads; r rᵀ of many words
    regions, words, lengths = inputs(2, 150, 9, 3, 9, on, torch.float64)
    with backend("reference"):
        truth = gradient(lambda *t: region_word_scores(*t, lengths, **form))(regions, words)
    found = gradient(lambda *t: region_word_scores(*t, lengths, **form))(regions, words)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_same_bits_in_any_order(form, on, native):
    # a missing barrier would show
    regions, words, lengths = inputs(3, 70, 16, 4, 9, on)
    lengths[1] = 0

    def results(seed):
        native.seed(seed)
        f = lambda *t: region_word_scores(*t, lengths, **form)[::2]  # noqa: E731
        return [f(regions, words), *gradient(f)(regions, words)]

    once = results(0)
    assert all(t.isfinite().all() for t in once)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(once, results(seed)))


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_what_is_not_finite_stays_visible(form, on):
    regions, words, lengths = inputs(3, 20, 9, 2, 5, on)
    regions[1, 7, 3] = torch.nan
    scores = region_word_scores(regions, words, lengths, **form)
    assert scores[:, 1].isnan().all()
    assert scores[:, ::2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rooms_keep_to_their_size(dtype, on):
    regions, words, lengths = inputs(9, 20, 9, 4, 5, on, dtype)
    packed = blocks._Words(regions, words, lengths, 4.0, 5.0, False)
    held = [block.s.nbytes + block.alpha.nbytes + block.h.nbytes
            for _, block in blocks._blocks(packed, regions)]  # fmt: skip
    room = blocks.BLOCK * (blocks.LAUNCH if on == "cuda" else 1)
    assert len(held) > 1 or on == "cuda"
    assert all(size <= room for size in held)


def test_places_of_no_word(on, monkeypatch):
    # as on a GPU, which does not wait for the number of words
    regions, words, lengths = inputs(3, 20, 9, 4, 5, on)
    f = lambda *t: region_word_scores(*t, lengths)  # noqa: E731
    whole = [f(regions, words), *gradient(f)(regions, words)]
    monkeypatch.setattr(blocks, "Texts", partial(blocks.Texts, counted=False))
    found = [f(regions, words), *gradient(f)(regions, words)]
    torch.testing.assert_close(found, whole)
