import importlib
import math

import pytest
import torch
from check import gradient, no_worse
from formulas import info_nce_formula as formula
from formulas import info_nce_metrics

from fastxm.ops import (
    backend,
    dispatch,
    gemm,
    info_nce,
    info_nce_blocks,
    info_nce_op,
    info_nce_tiles,
    info_nce_triton,
)
from fastxm.ops.info_nce_op import gradients_of, losses_of

SHAPES = [(1, 1, 1), (5, 5, 3), (33, 33, 65), (64, 64, 32), (130, 130, 17)]  # N, M, D
RECTANGLES = [(1, 4, 3, 2), (33, 70, 65, 30), (40, 300, 17, 0)]  # N, M, D, offset
OPTIONS = [
    {},
    {"symmetric": False},
    {"normalize": True},
    {"label_smoothing": 0.1},
    {"labels": 7, "symmetric": False},
    {"labels": 3, "label_smoothing": 0.2, "normalize": True},
]


@pytest.fixture(params=[True, False], ids=["kept", "again"])
def _blocks(monkeypatch, request):
    monkeypatch.setattr(info_nce_blocks, "BLOCK", 4096)
    monkeypatch.setattr(info_nce_op, "WORTH", {"cpu": 0} if request.param else {})


def inputs(N, M, D, device, dtype=torch.float32):
    x, y = torch.randn(N, D, device=device), torch.randn(M, D, device=device)
    return x.to(dtype), y.to(dtype), torch.tensor(1.7, device=device)


def bind(f, options, M, device, **more):
    """f with options, whose "labels" is how many classes the M labels have, and a loss a row."""
    options = {"reduction": "none", **options, **more}
    if "labels" in options:
        options["labels"] = torch.arange(M, device=device) ** 2 % options["labels"]
    return lambda x, y, scale: f(x, y, scale, **options)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, options, dtype, device):
    ours, plain = (bind(f, options, shape[1], device) for f in (info_nce, formula))
    no_worse(ours, plain, *inputs(*shape, device, dtype))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_backward(shape, options, dtype, device):
    ours, plain = (gradient(bind(f, options, shape[1], device)) for f in (info_nce, formula))
    few = 3.0 if shape[0] < 30 else 2.0  # a few numbers can be right by luck
    no_worse(ours, plain, *inputs(*shape, device, dtype), factor=few)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS[::5], ids=str)
@pytest.mark.parametrize("how", ["several blocks", "vendor products"])
def test_other_ways_of_a_cpu(how, options, dtype, monkeypatch):
    if how == "several blocks":  # of 240 rows
        monkeypatch.setattr(info_nce_tiles, "WORKSPACE", 1)
    else:  # as without AVX-512
        monkeypatch.setattr(gemm, "PACKED", ())
    given = inputs(301, 301, 33, "cpu", dtype)
    ours, plain = (bind(f, options, 301, "cpu") for f in (info_nce, formula))
    no_worse(ours, plain, *given)
    no_worse(gradient(ours), gradient(plain), *given)


def test_what_is_kept():
    # float32 up to N = 4096, bfloat16 where it is multiplied up to 5793; of few features nothing
    half = info_nce_tiles.halves(*torch.empty(2, 1, 1, dtype=torch.bfloat16))
    for dtype, most in ((torch.float32, 4096), (torch.bfloat16, 5792 if half else 4096)):
        for n, expected in ((most, True), (most + 1, False)):
            x = torch.empty(n, 64, dtype=dtype)
            assert info_nce_op.store(x, x, 64 << 20) == expected
            assert not info_nce_op.store(x[:, :63], x[:, :63], 64 << 20)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scale_gradient(options, device):
    # a single number can be right by luck: thirty of them
    def thirty(f):
        f = gradient(bind(f, options, 33, device), wrt=(2,))
        return lambda x, y, scale: torch.stack([f(a, b, scale)[0] for a, b in zip(x, y)])

    x, y, scale = inputs(30 * 33, 30 * 33, 20, device)
    no_worse(thirty(info_nce), thirty(formula), x.view(30, 33, 20), y.view(30, 33, 20), scale)


def test_reductions(device):
    x, y, scale = inputs(40, 40, 9, device)
    losses = info_nce(x, y, scale, reduction="none")
    torch.testing.assert_close(info_nce(x, y, scale), losses.mean())
    torch.testing.assert_close(info_nce(x, y, scale, reduction="sum"), losses.sum())


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize(("N", "M", "D", "offset"), RECTANGLES)
def test_rectangles(N, M, D, offset, classes, device):
    options = {"symmetric": False, "offset": offset, "label_smoothing": 0.1}
    options |= {"labels": classes} if classes else {}
    ours, plain = (bind(f, options, M, device) for f in (info_nce, formula))
    no_worse(ours, plain, *inputs(N, M, D, device))
    no_worse(gradient(ours), gradient(plain), *inputs(N, M, D, device))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(options, name):
    x, y, scale = inputs(5, 5, 3, "cpu", torch.float64)
    leaves = [t.double().requires_grad_() for t in (x, y, scale)]
    f = bind(info_nce, options, 5, "cpu")
    with backend(name):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_runs_and_any_thread_count_give_the_same_bits(options, device):
    before = torch.get_num_threads()
    f, all_three, exact = bind(info_nce, options, 300, device), [], []
    x, y, scale = inputs(300, 300, 300, device)
    eye = torch.eye(300, device=device)  # products with it do not round, in any order of threads
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        all_three.append(gradient(f, (0, 1, 2))(x, y, scale))
        exact.append([f(x, eye, scale), *gradient(f, (0,))(x, eye, scale)])
    torch.set_num_threads(before)
    for one, other in ((exact[0], exact[1]), (exact[1], exact[2]), (all_three[1], all_three[2])):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_metrics(name):
    x, y, scale = inputs(40, 40, 9, "cpu", torch.float64)
    for options in ({}, {"symmetric": False, "labels": torch.arange(40) % 7}, {"normalize": True}):
        with backend(name):
            _, metrics = info_nce(x, y, scale, return_metrics=True, **options)
        torch.testing.assert_close(torch.stack(metrics), info_nce_metrics(x, y, scale, **options))


def test_large_logits(device):
    x, y, _ = inputs(130, 130, 2048, device)
    scale = torch.tensor(100.0, device=device)
    ours, plain = (bind(f, {"normalize": True}, 130, device) for f in (info_nce, formula))
    no_worse(ours, plain, x, y, scale)
    no_worse(gradient(ours), gradient(plain), x, y, scale)
    ours, plain = (bind(f, {}, 130, device) for f in (info_nce, formula))
    no_worse(ours, plain, x, y, scale)
    no_worse(gradient(ours), gradient(plain), x, y, scale)


def test_closed_forms(device):
    x, y, scale = inputs(1, 1, 9, device)
    assert info_nce(x, y, scale) == 0
    same = torch.ones(50, 4, device=device)
    torch.testing.assert_close(info_nce(same, same, 3.0), torch.tensor(math.log(50), device=device))
    x, y, scale = inputs(40, 40, 9, device)
    order = torch.randperm(40, device=device)
    moved = info_nce(x[order], y[order], scale)
    torch.testing.assert_close(info_nce(x, y, scale), moved, rtol=1e-5, atol=0)
    # one label for all: nothing is left to be told apart
    assert info_nce(x, y, scale, labels=torch.zeros(40, dtype=torch.int32, device=device)) == 0


def unit(x):
    return x * x.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()


def check_short_rows(device):
    # a row shorter than 1e-6 is not brought to length 1, and its length counts
    x, y, scale = inputs(40, 40, 33, device)
    for rows in (x, y):
        rows[:4] = unit(rows[:4]) * torch.tensor([[0], [1e-9], [9e-7], [2e-6]], device=device)
    exact = gradient(lambda x, y, scale: formula(unit(x), unit(y), scale), (0, 1, 2))
    exact = exact(x.double(), y.double(), scale.double())
    found = gradient(lambda *t: info_nce(*t, normalize=True), (0, 1, 2))(x, y, scale)
    for one, other in zip(found, exact):
        errors = (one.double() - other).reshape(len(one) if one.ndim else 1, -1).norm(dim=1)
        assert (errors <= 1e-5 * other.reshape(len(errors), -1).norm(dim=1)).all()


def check_scale_of_0(device):
    given = *inputs(40, 40, 9, device)[:2], torch.tensor(0.0, device=device)
    for options in ({}, {"normalize": True}):
        ours, plain = (gradient(bind(f, options, 40, device), (0, 1, 2))
                       for f in (info_nce, formula))  # fmt: skip
        for one, other in zip(ours(*given), plain(*(t.double() for t in given))):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-12)


def test_rows_one_by_one(device):
    check_short_rows(device)
    check_scale_of_0(device)


def test_strided_inputs(device):
    x, y = torch.randn(9, 20, device=device).T, torch.randn(20, 18, device=device)[:, ::2]
    torch.testing.assert_close(info_nce(x, y, 1.5), info_nce(x.contiguous(), y.contiguous(), 1.5))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_empty(name):
    x = torch.empty(0, 4, requires_grad=True)
    with backend(name):
        assert info_nce(x, x, 1.0).isnan()
        assert info_nce(x, x, 1.0, reduction="sum", label_smoothing=0.1) == 0
        assert info_nce(x, x, 1.0, reduction="none").shape == (0,)
        y = torch.randn(3, 4, requires_grad=True)
        info_nce(x, y, 1.0, symmetric=False, reduction="sum").backward()
        assert torch.equal(y.grad, torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("x", "y", "options"),
    [
        ((3, 4), (3, 5), {}),
        ((3,), (3,), {}),
        ((3, 4), (5, 4), {}),
        ((5, 4), (3, 4), {"symmetric": False}),
        ((3, 4), (5, 4), {"symmetric": False, "offset": 3}),
        ((3, 4), (3, 4), {"labels": torch.zeros(4, dtype=torch.long)}),
        ((3, 4), (3, 4), {"label_smoothing": 1.0}),
        ((3, 4), (3, 4), {"reduction": "average"}),
    ],
)
def test_wrong_inputs(x, y, options):
    with pytest.raises(ValueError):
        info_nce(torch.ones(x), torch.ones(y), 1.0, **options)


def test_wrong_type():
    with pytest.raises(TypeError, match="floating"):
        info_nce(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.long), 1.0)


def test_dispatch(device):
    x, y, scale = (t.requires_grad_() for t in inputs(6, 6, 5, device))
    for labels in (None, torch.arange(6, device=device) % 2):
        for stored in (True, False):
            given = (x, y, scale, stored, labels, True, 0.1, 0, stored)  # normalised and not
            torch.library.opcheck(losses_of, given)
    check_gradients(device)
    compiled = torch.compile(lambda *t: info_nce(*t, normalize=True), fullgraph=True)
    torch.testing.assert_close(compiled(x, y, scale), info_nce(x, y, scale, normalize=True))
    with torch.autocast(device, torch.bfloat16):
        out = info_nce(x.bfloat16(), y.bfloat16(), scale)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, info_nce(x.bfloat16().float(), y.bfloat16().float(), scale))
    with backend("reference"):
        plain = info_nce(x, y, scale)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(info_nce(x, y, scale), plain)
    assert info_nce(x.double(), y.double(), 2.0).dtype == torch.float64
    with backend("triton"), pytest.raises(RuntimeError, match="no triton backend"):
        info_nce(x.double(), y.double(), scale)


def check_gradients(device):
    # of columns in memory, and of features that tiles and tensor cores take with more beside them
    for dtype, D in ((torch.float32, 33), (torch.bfloat16, 5)):
        if dtype == torch.bfloat16 and device == "cpu" and dispatch.forced:
            continue  # Triton's interpreter multiplies it wrongly
        x, y = (torch.randn(D, 40, device=device).to(dtype).T for _ in range(2))
        dloss, scale = torch.ones(40, device=device), torch.tensor(1.5, device=device)
        for normalize in (True, False):
            found = losses_of(x, y, scale, normalize, None, True, 0.0, 0, False)
            _, *stats, kept, rnorms = found
            given = (dloss, x, y, scale, rnorms, None, *(s[0].clone() for s in stats), kept)
            torch.library.opcheck(gradients_of, (*given, True, 0.0, 0))


def sines(shape, a, c):
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + c).view(shape)


def test_golden():
    # LAFITE's C operator, plain InfoNCE: log(tau * softmax) at tau = 0.5, in both directions
    a, h = sines((4, 8), 0.7, 0.3), sines((4, 8), 1.3, 0.1)
    options = {"symmetric": False, "normalize": True}
    over_images = math.log(0.5) - info_nce(h, a, 2.0, **options)
    over_texts = math.log(0.5) - info_nce(a, h, 2.0, **options)
    assert over_images.item() == pytest.approx(-1.9265106, abs=1e-6)
    assert over_texts.item() == pytest.approx(-2.0351261, abs=1e-6)


@pytest.mark.parametrize("N", [1000, 1100])
def test_sums_of_columns_in_a_place_of_their_own_and_in_the_gradients(N, device):
    given = inputs(N, N, 1024, device)  # of a CPU a million of them is the border
    ours, plain = (gradient(bind(f, {}, N, device)) for f in (info_nce, formula))
    no_worse(ours, plain, *given)


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton runs, with several bands and strips to small problems."""
    monkeypatch.setattr(info_nce_triton, "BAND", 64)
    monkeypatch.setattr(info_nce_triton, "STRIP", 1)
    with backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_triton(shape, options, triton_device):
    ours, plain = (bind(f, options, shape[1], triton_device) for f in (info_nce, formula))
    given = inputs(*shape, triton_device)
    no_worse(ours, plain, *given)
    no_worse(gradient(ours), gradient(plain), *given)
    # one number, of which plain PyTorch's own error is luck
    no_worse(gradient(ours, (2,)), gradient(plain, (2,)), *given, factor=10)


@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize(("N", "M", "D", "offset"), RECTANGLES)
def test_triton_rectangles(N, M, D, offset, classes, triton_device):
    test_rectangles(N, M, D, offset, classes, triton_device)


def test_triton_with_maxima_alone(triton_device, monkeypatch):
    kernels = importlib.import_module("fastxm.kernels.info_nce")
    monkeypatch.setattr(kernels, "one_reference", lambda arch: False)
    for shape in SHAPES[-2:]:
        test_triton(shape, {}, triton_device)


@pytest.mark.parametrize(("version", "works"), [("3.5.1", True), ("3.6.0", False),
                                                ("3.7.1", False), ("3.8.0", True)])  # fmt: skip
def test_one_reference_where_triton_compiles_it(version, works, monkeypatch):
    tiles = importlib.import_module("fastxm.kernels.info_nce_tiles")
    monkeypatch.setattr(tiles.triton, "__version__", version)
    assert tiles.one_reference(90)
    assert tiles.one_reference(100) == works


def test_triton_extremes(triton_device):
    test_large_logits(triton_device)
    test_closed_forms(triton_device)
    check_short_rows(triton_device)
    check_scale_of_0(triton_device)
    test_strided_inputs(triton_device)
    check_gradients(triton_device)
