import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from check import gradient, no_worse, peak_bytes
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import normalize

from fastxm.losses import mmd_loss
from fastxm.ops import (
    backend,
    gemm,
    median_heuristic,
    mmd2,
    mmd2_and_variance,
    mmd_backends,
    mmd_checks,
    mmd_median,
    mmd_moments,
    mmd_moments_reference,
    mmd_permutation_test,
    mmd_sums,
)
from fastxm.ops.mmd import RBF, Energy, Laplace, Linear, Polynomial, RationalQuadratic
from fastxm.ops.mmd_checks import stated

LADDER = RBF((1, 2, 4, 8, 16))
KERNELS = {
    "rbf": RBF(3.0),
    "ladder": LADDER,
    "rq": RationalQuadratic(),
    "laplace": Laplace((1.0, 3.0)),
    "energy": Energy(),
    "polynomial": Polynomial(),
    "sum": RationalQuadratic((0.5, 2.0)) + Linear(0.1),
    "sums": RBF(3.0) + Laplace((1.0, 3.0)) + Polynomial() + Energy() + Linear(0.1),
}
ESTIMATORS = ["biased", "unbiased", "u_statistic", "linear", "block"]
SHAPES = [(2, 2, 1), (5, 7, 3), (33, 70, 65), (257, 300, 17), (530, 515, 4)]  # N, M, D


def by_name(table):
    return pytest.mark.parametrize("kernel", table.values(), ids=table.keys())


def samples(n, m, d, device="cpu", dtype=torch.float32, problems=None):
    """Several problems [P, N, D] and [P, M, D]: their largest error is no accident of one."""
    problems = problems or (16 if n < 100 else 3)
    x, y = torch.randn(problems, n, d), torch.randn(problems, m, d) * 1.2 + 0.5
    return x.to(device, dtype), y.to(device, dtype)


def kernel_formula(kernel, x: Tensor, y: Tensor, same: bool) -> Tensor:
    if hasattr(kernel, "parts"):
        return sum(kernel_formula(k, x, y, same) for k in kernel.parts)
    dot = x @ y.T
    d2 = ((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * dot).clamp(min=0)
    if same:
        d2 = d2 - torch.diag(d2.diag())
    distance = torch.where(d2 > 0, d2, 1).sqrt() * (d2 > 0)
    if type(kernel) is RBF:
        bandwidths = kernel.bandwidths if isinstance(kernel.bandwidths, tuple) else [3.0]
        return sum(torch.exp(-d2 / (2 * s**2)) for s in bandwidths)
    if isinstance(kernel, RationalQuadratic):
        return sum((1 + d2 / (2 * a)) ** -a for a in kernel.alphas)
    if isinstance(kernel, Laplace):
        return sum(torch.exp(-distance / s) for s in kernel.bandwidths)
    if isinstance(kernel, Energy):
        return -distance
    return (dot / x.shape[1] + 1) ** 3 if isinstance(kernel, Polynomial) else kernel.weight * dot


def formula(kernel, estimator):
    """MMD^2 of every problem, written out."""

    def one(x: Tensor, y: Tensor) -> Tensor:
        x, y = (z if z.dtype == torch.float64 else z.float() for z in (x, y))
        xx, yy = kernel_formula(kernel, x, x, True), kernel_formula(kernel, y, y, True)
        xy, n, m = kernel_formula(kernel, x, y, False), len(x), len(y)
        if estimator == "biased":
            return xx.mean() + yy.mean() - 2 * xy.mean()
        xx, yy = xx.sum() - xx.trace(), yy.sum() - yy.trace()
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy.mean()

    return lambda x, y: torch.stack([one(u, v) for u, v in zip(x, y)])


def ours(kernel, estimator):
    return lambda x, y: torch.stack([mmd2(u, v, kernel, estimator=estimator) for u, v in zip(x, y)])


@by_name(KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(kernel, shape, device):
    no_worse(ours(kernel, "biased"), formula(kernel, "biased"), *samples(*shape, device))


@by_name(KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(kernel, shape, device):
    plain = gradient(formula(kernel, "unbiased"))
    no_worse(gradient(ours(kernel, "unbiased")), plain, *samples(*shape, device))


def test_bfloat16(device):
    x, y = samples(33, 70, 65, device, torch.bfloat16)
    assert ours(LADDER, "biased")(x, y).dtype == torch.float32
    no_worse(ours(LADDER, "biased"), formula(LADDER, "biased"), x, y)
    no_worse(gradient(ours(LADDER, "biased")), gradient(formula(LADDER, "biased")), x, y)
    with backend("reference"):  # float32 sums of rows that are not centred, as in test_precision
        no_worse(ours(LADDER, "biased"), formula(LADDER, "biased"), x, y, factor=16)


@by_name(KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
def test_reference_and_chosen_agree(kernel, estimator, device):
    x, y = samples(70, 70, 5, device, torch.float64)
    with backend("reference"):
        plain = gradient(ours(kernel, estimator))(x, y)
    for a, b in zip(gradient(ours(kernel, estimator))(x, y), plain):
        torch.testing.assert_close(a, b)


def wells(kernel_of, device):
    """x, y, weights and numbers of a kernel, for numerical derivatives."""
    x, y = torch.randn(4, 3), torch.randn(5, 3) + 0.5
    tensors = (x, y, torch.rand(4) + 0.5, torch.rand(5) + 0.5, torch.tensor([0.7, 1.4]))
    leaves = [t.to(device, torch.float64).requires_grad_() for t in tensors]
    return lambda x, y, a, b, p: mmd2(
        x, y, kernel_of(p), estimator="unbiased", x_weight=a, y_weight=b
    ), leaves


LEARNED = {
    "rbf": lambda p: RBF(p, weights=p + 1),
    "rq": RationalQuadratic,
    "laplace": lambda p: Laplace((p[0], p[1])),
    "energy": lambda p: Energy(p[0]),
    "polynomial": lambda p: Polynomial(2, p[0], p[1]),
    "sum": lambda p: RBF(p[0]) + Linear(p[1]),
    "sums": lambda p: RBF(p) + Laplace(p[1], weights=p[0]) + Polynomial(3, p[0]) + Linear(p[1]),
    "ladder": lambda p: RBF((p[0], 2 * p[0], 4 * p[0], 3 * p[1]), weights=p.repeat(2)),
}


@by_name(LEARNED)
def test_derivatives(kernel, device):
    f, leaves = wells(kernel, device)
    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)
    leaves[4] = leaves[4].detach()
    assert gradcheck(f, leaves)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_derivatives_of_estimators(estimator, device):
    x, y = (t[0].requires_grad_() for t in samples(6, 6, 2, device, torch.float64))
    assert gradcheck(lambda x, y: mmd2(x, y, estimator=estimator), (x, y))
    assert gradgradcheck(lambda x, y: mmd2(x, y, estimator=estimator), (x, y))


def against_the_reference(kernel, x, y):
    p = torch.tensor([0.7, 1.4], dtype=x.dtype, device=x.device, requires_grad=True)
    weight = torch.rand(len(x), dtype=x.dtype, device=x.device, requires_grad=True)

    def found():
        total = mmd2(x, y, kernel(p), estimator="unbiased", x_weight=weight)
        return torch.autograd.grad(total, (p, weight))

    with backend("reference"):
        plain = found()
    torch.testing.assert_close(found(), plain)


@by_name(LEARNED)
def test_gradients_of_bandwidths(kernel, device):
    # over several tiles
    given = samples(530, 515, 4, device, torch.float64)
    against_the_reference(kernel, *(t[0, :, :3] for t in given))


BATCHES = [(3, 5, 7, 4), (2, 40, 33, 9), (2, 300, 257, 3)]  # G, N, M, D


@by_name({name: KERNELS[name] for name in ("ladder", "polynomial", "sums")})
@pytest.mark.parametrize("shape", BATCHES)
def test_batches(kernel, shape, device):
    G, N, M, D = shape
    x = torch.randn(G, N, D, device=device, dtype=torch.float64) + 3
    y = torch.randn(G, M, D, device=device, dtype=torch.float64) + torch.arange(G)[:, None, None]
    a = torch.rand(G, N, device=device, dtype=torch.float64)
    for options in ({"estimator": "unbiased", "x_weight": a}, {"estimator": "u_statistic"}):
        u, v = (x, y) if "x_weight" in options else (x[:, :5], y[:, :5])

        def together(u, v, options=options):
            return mmd2(u, v, kernel, **options)

        def apart(u, v, options=options):
            each = [{**options, "x_weight": w} if "x_weight" in options else options for w in a]
            return torch.stack([mmd2(p, q, kernel, **o) for p, q, o in zip(u, v, each)])

        torch.testing.assert_close(together(u, v), apart(u, v))
        torch.testing.assert_close(gradient(together)(u, v), gradient(apart)(u, v))


def test_ragged(device):
    sizes = [(3, 4), (1, 9), (30, 2)]
    x_starts, y_starts = (torch.tensor([0, *c]).cumsum(0) for c in zip(*sizes))
    x, y = (torch.randn(n, 5, dtype=torch.float64, device=device) for n in (34, 15))
    p = torch.tensor([0.7, 1.4], dtype=torch.float64, device=device)

    def together(x, y, p):
        return mmd2(x, y, RBF(p) + Linear(p[0]), x_starts=x_starts, y_starts=y_starts)

    def apart(x, y, p):
        both = zip(x.split([n for n, _ in sizes]), y.split([m for _, m in sizes]))
        return torch.stack([mmd2(u, v, RBF(p) + Linear(p[0])) for u, v in both])

    same, wrt = torch.testing.assert_close, (0, 1, 2)
    same(together(x, y, p), apart(x, y, p))
    same(gradient(together, wrt)(x, y, p), gradient(apart, wrt)(x, y, p))
    with backend("reference"):
        same(gradient(together, wrt)(x, y, p), gradient(apart, wrt)(x, y, p))
    leaves = [t.requires_grad_() for t in (x, y, p)]
    twice = [torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
             for f in (together, apart)]  # fmt: skip
    second = [torch.autograd.grad(sum(g.square().sum() for g in t), leaves) for t in twice]
    same(second[0], second[1])


@pytest.mark.parametrize("estimator", ["linear", "block"])
def test_batches_of_other_estimators(estimator, device):
    x, y = (torch.randn(3, 9, 4, device=device, dtype=torch.float64) for _ in range(2))
    each = torch.stack([mmd2(u, v, estimator=estimator) for u, v in zip(x, y)])
    torch.testing.assert_close(mmd2(x, y, estimator=estimator), each)


def test_precision(device):
    x, y = (t[0] for t in samples(257, 300, 17, device))
    truth = mmd2(x.double(), y.double())
    # distances of rounded rows: 8 bits each, of which the errors of many pairs cancel
    assert abs(mmd2(x, y, precision="bfloat16") - truth) < 2**-8 * truth
    assert torch.equal(mmd2(x, y, precision="float32"), mmd2(x, y))
    # rows that come as bfloat16 lose nothing, wherever their mean is
    shift = torch.full_like(x[:1], 4.0).bfloat16()
    x, y = x.bfloat16() + shift, y.bfloat16() + shift
    no_worse(mmd2, lambda u, v: mmd2(u, v, precision="float32" if u.dtype == torch.bfloat16
             else None), x, y, factor=16)  # fmt: skip


def test_second_order_of_a_sample_with_itself(device):
    x = samples(6, 6, 2, device, torch.float64)[0][0].requires_grad_()
    (once,) = torch.autograd.grad(mmd2(x, 2 * x), x)
    (twice,) = torch.autograd.grad(mmd2(x, 2 * x), x, create_graph=True)
    torch.testing.assert_close(once, twice.detach())


def test_only_wanted_gradients(device):
    x, y = (t[0] for t in samples(40, 30, 5, device))
    u, v = x.clone().requires_grad_(), y.clone().requires_grad_()
    both = torch.autograd.grad(mmd2(u, v), (u, v))
    assert torch.equal(torch.autograd.grad(mmd2(u, y), u)[0], both[0])
    torch.testing.assert_close(torch.autograd.grad(mmd2(x, v), v)[0], both[1])


def test_dispatch(device):
    x, y = (t[0].requires_grad_() for t in samples(9, 7, 5, device))
    kernel, starts = RBF((1, 2)), torch.tensor([0, 3, 7])
    a, b = x.new_full((9,), 1 / 9), y.new_full((7,), 1 / 7)
    numbers, parameters = stated([kernel], x)
    options = (numbers, True, False, "float32", [True, True, True])
    for where, c in ((None, x.new_ones(1, 3)), (starts, x.new_ones(2, 3))):
        some = where if where is None else torch.tensor([0, 4, 9])
        args = (x, y, a, b, c.double(), parameters, some, where, *options)
        torch.library.opcheck(mmd_sums._fwd, args)
    want = torch.autograd.grad(mmd2(x, y, kernel), (x, y))
    compiled = torch.compile(lambda x, y: mmd2(x, y, kernel), fullgraph=True, backend="aot_eager")
    for got, g in zip(torch.autograd.grad(compiled(x, y), (x, y)), want):
        torch.testing.assert_close(got, g)
    with torch.autocast(device, torch.bfloat16):
        inside = mmd2(x, y, kernel + Linear())
    assert torch.equal(inside, mmd2(x, y, kernel + Linear()))
    with backend("triton"), pytest.raises(RuntimeError, match="mmd"):
        mmd2(x.double(), y.double())


@pytest.fixture
def triton_device(monkeypatch):
    # several tiles, of several blocks each
    monkeypatch.setitem(mmd_backends.TILE, "triton", 64)
    with backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


@by_name(KERNELS)
@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 70, 65), (130, 97, 17)])
def test_triton(kernel, shape, triton_device):
    # of a few pairs the largest error is that of the two that lie nearest to each other
    given = [t[: 16 if shape[0] < 10 else 2] for t in samples(*shape, triton_device)]
    no_worse(ours(kernel, "biased"), formula(kernel, "biased"), *given)
    no_worse(gradient(ours(kernel, "unbiased")), gradient(formula(kernel, "unbiased")), *given)
    u_statistic = ours(kernel, "u_statistic")
    x, y = (t[:, :5] for t in given)
    with backend("reference"):
        plain = gradient(u_statistic)(x, y)
    torch.testing.assert_close(gradient(u_statistic)(x, y), plain, atol=1e-5, rtol=1e-4)


def test_triton_takes_powers_where_bandwidths_are_numbers(triton_device):
    x, y = (t[0] for t in samples(33, 40, 5, triton_device))
    values = (1.0, 4.0, 2.0, 8.0)  # in any order
    known, unknown = RBF(values), RBF(torch.tensor(values))
    assert [kernel.term(4).degree for kernel in (known, unknown, RBF((1, 2, 5)))] == [4, 1, 1]
    for both in zip(*(gradient(lambda x, y, k=k: mmd2(x, y, k))(x, y) for k in (known, unknown))):
        torch.testing.assert_close(*both)


def test_triton_gradients_of_bandwidths(triton_device):
    x, y = (t[0] for t in samples(33, 70, 5, triton_device))
    p = torch.tensor([0.7, 1.4], device=triton_device, requires_grad=True)
    (found,) = torch.autograd.grad(mmd2(x, y, RBF(p)), p)
    with backend("reference"):
        torch.testing.assert_close(torch.autograd.grad(mmd2(x, y, RBF(p)), p)[0], found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_threads(dtype):
    # three blocks of rows against two; without tile kernels the vendor's products may differ
    x, y = (t[0].requires_grad_() for t in samples(801, 530, 17, dtype=dtype))
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        total = mmd2(x, y, LADDER)
        found = torch.autograd.grad(total, (x, y)) if dtype in gemm.PACKED else ()
        runs.append((total.detach(), *found))
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_of_one_row_reaches_all_that_meet_it(dtype, device):
    x, y = (t[0].to(device) for t in samples(800, 530, 5, dtype=dtype))
    x[700, 2] = math.nan
    x, y = x.requires_grad_(), y.requires_grad_()
    total = mmd2(x, y)
    assert total.isnan()
    assert all(g.isnan().all() for g in torch.autograd.grad(total, (x, y)))


@pytest.mark.parametrize("name", [None, "reference"])
def test_a_row_has_no_slope_to_itself(name, device):
    # rows as given and as multiplied differ; a narrow kernel's true gradient is a billionth of that
    x, y = (torch.randn(n, 65, device=device).bfloat16() for n in (40, 50))

    def slope(x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(mmd2(leaf, y.to(x), RBF(1)), leaf)[0].double()

    truth = slope(x.double())
    with backend(name) if name else nullcontext():
        found = slope(x)
    assert truth.abs().max() < 1e-12
    # weights and the result are bfloat16: two roundings of 2^-9, and as much for what they cancel
    assert (found - truth).abs().max() <= 2**-7 * truth.abs().max()


def test_tf32_is_read_where_a_compiled_graph_can_follow():
    mode = torch.backends.cuda.matmul.fp32_precision
    read = torch.compile(lambda t: t + mmd_checks.tf32_allowed(), fullgraph=True, backend="eager")
    try:
        for setting in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert read(torch.zeros(())).item() == (setting == "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = mode


def test_nan_of_one_row_reaches_all_by_triton(device):
    x, y = (t[0].float().to(device) for t in samples(6, 5, 3, dtype=torch.float32))
    x[4, 2] = math.nan
    x, y = x.requires_grad_(), y.requires_grad_()
    with backend("triton"):
        total = mmd2(x, y)
        assert total.isnan()
        assert all(g.isnan().all() for g in torch.autograd.grad(total, (x, y)))


GOLDEN = [  # biased, unbiased, u_statistic, linear, block of 3
    (RBF(1), [0.5679130031, 0.3466467213, 0.3700576143, 0.9051825431, 0.5983713407]),
    (LADDER, [1.1460136556, 0.7788010913, 0.8466700702, 1.7693010754, 1.2650401926]),
    (RationalQuadratic() + Linear(),
     [4.6579369469, 3.2633182947, 3.5749518082, 6.7286415729, 5.0985132957]),
    (Polynomial(), [2.6902951265, 1.9812326315, 2.1418182950, 4.2161050736, 3.0204924301]),
    (Linear(), [2.5250228486, 1.9699173216, 2.1880890414, 3.5408176921, 2.9185660627]),
]  # fmt: skip


def fixture() -> tuple[Tensor, Tensor]:
    i, k = torch.arange(6.0).double()[:, None], torch.arange(4.0).double()
    return torch.sin(0.7 * i + 1.3 * k), torch.cos(0.5 * i - 0.9 * k) + 0.25


def test_golden_estimators():
    x, y = fixture()
    for kernel, values in GOLDEN:
        for estimator, value in zip(ESTIMATORS, values):
            size = 3 if estimator == "block" else None
            got = mmd2(x, y, kernel, estimator=estimator, block_size=size)
            assert abs(got - value) < 1e-10, (kernel, estimator)


def test_golden_variance():
    x, y = fixture()
    variances = {RBF(1): 0.0143951655, LADDER: 0.0930910266, Polynomial(): 0.5208645543}
    for kernel, value in variances.items():
        statistic, variance = mmd2_and_variance(x, y, kernel)
        assert abs(variance - value) < 1e-10
        assert abs(statistic - mmd2(x, y, kernel, estimator="unbiased")) < 1e-12
    statistic, variance = mmd2_and_variance(x, y, LADDER)
    assert abs(statistic / variance.clamp_min(1e-8).sqrt() - 2.5525404999) < 1e-9


def test_golden_gradient():
    x, y = fixture()
    rows = {"biased": [-0.0878551693, -0.1011592434, -0.1647547658, -0.1374960362],
            "unbiased": [-0.0729462826, -0.1178253630, -0.1885799876, -0.1335763545]}  # fmt: skip
    for estimator, row in rows.items():
        u = x.clone().requires_grad_()
        mmd2(u, y[:5], LADDER, estimator=estimator).backward()
        assert (u.grad[0] - torch.tensor(row)).abs().max() < 1e-7


def test_golden_others():
    x, y = fixture()
    assert abs(median_heuristic(x, y) - 2.0786732022) < 1e-10
    assert abs(median_heuristic(x, y) / math.sqrt(2) - 1.4698439172) < 1e-10
    assert abs(1000 * mmd2(normalize(x), normalize(y), RBF(10)) - 9.2632496428) < 1e-10
    # MMD-GAN's overlapping pairs are the linear estimator of each two neighbours
    overlapping = {Linear(): 3.9550246393, Polynomial(2, 1.0, 2.0): 22.1241365976}
    for kernel, value in overlapping.items():
        pairs = [mmd2(x[i : i + 2], y[i : i + 2], kernel, estimator="linear") for i in range(5)]
        assert abs(sum(pairs) / 5 - value) < 1e-9


def dense_variance(kernel, x, y):
    """The variance of specs in whole matrices."""
    c, pairs = float(len(x)), ((x, x), (y, y), (x, y))
    xx, yy, xy = (kernel_formula(kernel, u, v, u is v) for u, v in pairs)
    xx, yy = (k - k.diag().diag() for k in (xx, yy))
    e, a, b = torch.ones_like(xx[0]), xx.sum(1), yy.sum(1)
    p, q, squares = xy @ e, xy.T @ e, [(k * k).sum() for k in (xx, yy, xy)]
    return (
        2 / (c**2 * (c - 1) ** 2) * (2 * a @ a - squares[0] + 2 * b @ b - squares[1])
        - (4 * c - 6) / (c**3 * (c - 1) ** 3) * (a.sum() ** 2 + b.sum() ** 2)
        + 4 * (c - 2) / (c**3 * (c - 1) ** 2) * (p @ p + q @ q)
        - 4 * (c - 3) / (c**3 * (c - 1) ** 2) * squares[2]
        - (8 * c - 12) / (c**5 * (c - 1)) * p.sum() ** 2
        + 8 / (c**3 * (c - 1)) * ((a.sum() + b.sum()) * p.sum() / c - a @ p - b @ q)
    )


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (mmd_moments_reference, mmd_median):
        monkeypatch.setattr(module, "BLOCK", 1 << 10)
    monkeypatch.setitem(mmd_backends.TILE, "cpu", 50)


@by_name(KERNELS)
@pytest.mark.parametrize("name", ["chosen", "reference"])
def test_variance_by_blocks(kernel, name, device, small_blocks):
    # cancellation in a few problems is most of these kernels' error
    problems = 64 if isinstance(kernel, (Laplace, Polynomial)) else 16
    x, y = (t[..., :3] for t in samples(70, 70, 5, device, torch.float64, problems=problems))

    def ours(x, y):
        return torch.stack([mmd2_and_variance(u, v, kernel)[1] for u, v in zip(x, y)])

    def dense(x, y):
        return torch.stack([dense_variance(kernel, u, v) for u, v in zip(x, y)])

    with backend(name) if name == "reference" else nullcontext():
        torch.testing.assert_close(ours(x, y), dense(x, y))
        torch.testing.assert_close(gradient(ours)(x, y), gradient(dense)(x, y))
        no_worse(ours, dense, x.float(), y.float())
        factor = 4 if name == "reference" else 2  # its blocks sum gradients in float32
        no_worse(gradient(ours), gradient(dense), x.float(), y.float(), factor=factor)


@by_name(LEARNED)
@pytest.mark.parametrize("name", ["chosen", "reference"])
def test_derivatives_of_the_variance(kernel, name, device):
    x, y, _, _, p = wells(kernel, device)[1]
    leaves = [torch.cat([x.detach(), y[:1].detach() + 1]).requires_grad_(), y, p]

    def f(x, y, p):
        return mmd2_and_variance(x, y, kernel(p))

    with backend(name) if name == "reference" else nullcontext():
        assert gradcheck(f, leaves)
        assert gradgradcheck(f, leaves)
        for some in ([0], [1], [2], [0, 2]):
            assert gradcheck(f, [t if i in some else t.detach() for i, t in enumerate(leaves)])


def test_dispatch_of_the_variance(device):
    x, y = (t[0].requires_grad_() for t in samples(9, 9, 5, device))
    kernel = RBF((1, 2))
    numbers, parameters = stated([kernel], x)
    torch.library.opcheck(mmd_moments._fwd, (x, y, parameters, numbers))
    want = torch.autograd.grad(mmd2_and_variance(x, y, kernel), (x, y))
    compiled = torch.compile(mmd2_and_variance, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y, kernel), (x, y)), want)
    there = "mmd2_and_variance has no triton backend for .* tensors, of reference, cpu"
    with backend("triton"), pytest.raises(NotImplementedError, match=there):
        mmd2_and_variance(x, y, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (30, 33), (70, 71)])
def test_median_by_blocks(n, m, dtype, device, small_blocks):
    x, y = (t[0] for t in samples(n, m, 3, device, dtype))
    d = torch.pdist(torch.cat([x, y]).double()).sort().values
    middle = (d[(len(d) - 1) // 2] + d[len(d) // 2]) / 2
    assert median_heuristic(x, y).dtype == dtype
    torch.testing.assert_close(median_heuristic(x, y), middle.to(dtype))
    same = torch.ones_like(x)
    assert median_heuristic(same, same[:1]) == 0


def test_memory_of_blocks(monkeypatch):
    for module in (mmd_moments_reference, mmd_median):
        monkeypatch.setattr(module, "BLOCK", 1 << 13)
    monkeypatch.setitem(mmd_backends.TILE, "cpu", 50)
    x, y = (torch.randn(600, 4, requires_grad=True) for _ in range(2))
    matrix = 4 * 600 * 600
    for kernel in (RBF(3.0), RBF(3.0) + Linear()):  # by tiles of C++, and in plain PyTorch
        call = partial(mmd2_and_variance, x, y, kernel)
        assert peak_bytes(lambda call=call: call()[1].backward()) < matrix
    assert peak_bytes(lambda: median_heuristic(x, y)) < 2 * matrix  # half of the 1,200 rows' pairs


def test_closed_forms(device):
    x, y = (t[0] for t in samples(30, 20, 5, device, torch.float64))
    same = torch.testing.assert_close
    same(mmd2(x, y, Linear()), (x.mean(0) - y.mean(0)).square().sum())
    same(mmd2(x, y), mmd2(y, x))
    same(mmd2(x, y), mmd2(x.flip(0), y))
    same(mmd2(x, x), x.new_zeros(()), atol=1e-14, rtol=0)
    # |x| + |y| - |x - y| is the textbook kernel: its norms cancel
    d = torch.cdist(x, y).mean() * 2 - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()
    same(mmd2(x, y, Energy()), d)
    # a weight of two is the row twice
    weight = torch.ones(30, device=device, dtype=torch.float64)
    weight[4] = 2
    same(mmd2(x, y, x_weight=weight), mmd2(torch.cat([x, x[4:5]]), y))
    same(
        mmd2(x, y, estimator="unbiased", x_weight=weight * 0 + 3), mmd2(x, y, estimator="unbiased")
    )
    # a single bandwidth tensor is the number
    assert torch.equal(mmd2(x, y, RBF(torch.tensor(2.0))), mmd2(x, y, RBF(2.0)))


def test_loss_and_its_root(device):
    x, y = (t[0].requires_grad_() for t in samples(30, 20, 5, device, torch.float64))
    torch.testing.assert_close(mmd_loss(x, y), mmd2(x, y))
    torch.testing.assert_close(mmd_loss(x, y, root=True), (mmd2(x, y) + 1e-8).sqrt())
    # unbiased and root: below 0 the loss is sqrt(eps), flat
    z = mmd_loss(x, x.detach(), estimator="unbiased", root=True)
    assert z == 1e-4
    assert torch.equal(torch.autograd.grad(z, x)[0], torch.zeros_like(x))


def test_extremes(device):
    x, y = (t[0] for t in samples(40, 30, 5, device))
    # far from the origin: distances come from centred rows
    shift = x.new_full((5,), 1024.0)
    x, y = (x * 256).round() / 256, (y * 256).round() / 256
    torch.testing.assert_close(mmd2(x + shift, y + shift), mmd2(x, y))
    # no overlap: k(x, y) is 0, gradients are finite and the far samples do not pull
    u = (x * 1e6).requires_grad_()
    total = mmd2(u, y - 1e6)
    total.backward()
    assert total.isfinite()
    assert u.grad.isfinite().all()
    # coincident rows
    u = torch.zeros(7, 3, device=device, requires_grad=True)
    for kernel in (LADDER, Laplace(), Energy(), RationalQuadratic()):
        (g,) = torch.autograd.grad(mmd2(u, torch.zeros_like(u), kernel), u)
        assert torch.equal(g, torch.zeros_like(g))
    assert mmd2(torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device)) > 0


def test_permutation_p_values_are_uniform(device):
    generator = torch.Generator(device).manual_seed(0)
    p_values = []
    for _ in range(200):
        z = torch.randn(24, 2, device=device)
        p_values.append(mmd_permutation_test(z[:12], z[12:], RBF(1.0), 19, generator=generator)[1])
    p = torch.stack(p_values)
    # p <= 0.05 k has probability 0.05 k under the null; four standard errors of 200 trials
    for level in (0.05, 0.25, 0.5, 0.75):
        share, error = (p <= level + 1e-9).double().mean(), math.sqrt(level * (1 - level) / 200)
        assert abs(share - level) < 4 * error
    statistic, p_value = mmd_permutation_test(z[:12], z[12:] + 3, RBF(1.0), generator=generator)
    assert p_value == 1 / 1001
    torch.testing.assert_close(
        statistic.float(), mmd2(z[:12], z[12:] + 3, RBF(1.0), estimator="unbiased")
    )


def test_permutations_of_two_rows_all_tie():
    z = torch.tensor([[0.0], [0.1], [5.0], [5.3]])
    _, p = mmd_permutation_test(z[:2], z[2:], RBF(1.0), 3000)
    assert abs(p - 1 / 3) < 4 * math.sqrt(2 / 9 / 3000)


def ragged(x, y, x_starts, y_starts, **options):
    starts = {"x_starts": torch.tensor(x_starts), "y_starts": torch.tensor(y_starts)}
    return mmd2(x, y, **starts, **options)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ValueError, lambda x, y: RBF(0.0)),
        (ValueError, lambda x, y: RBF((1.0, -2.0))),
        (ValueError, lambda x, y: Laplace(torch.tensor([1.0, 0.0]))),
        (ValueError, lambda x, y: RationalQuadratic(())),
        (ValueError, lambda x, y: Polynomial(0)),
        (ValueError, lambda x, y: mmd2(x, y, RBF((1, 2), weights=(1, 2, 3)))),
        (ValueError, lambda x, y: mmd2(x[:1], y, estimator="unbiased")),
        (ValueError, lambda x, y: mmd2(x, y[:, :2])),
        (ValueError, lambda x, y: mmd2(x[0], y)),
        (ValueError, lambda x, y: mmd2(x[:0], y)),
        (ValueError, lambda x, y: mmd2(x, y, estimator="median")),
        (ValueError, lambda x, y: mmd2(x, y[:3], estimator="linear")),
        (ValueError, lambda x, y: mmd2(x, y, estimator="block", block_size=1)),
        (ValueError, lambda x, y: mmd2(x, y, block_size=3)),
        (ValueError, lambda x, y: mmd2(x, y, x_weight=x[:3, 0])),
        (ValueError, lambda x, y: mmd2(x, y, estimator="block", x_weight=x[:, 0])),
        (ValueError, lambda x, y: mmd2_and_variance(x[:3], y[:3], RBF())),
        (ValueError, lambda x, y: mmd_permutation_test(x, y, RBF(), 0)),
        (ValueError, lambda x, y: mmd2(x, y, precision="half")),
        (ValueError, lambda x, y: mmd2(x, y, precision="bfloat16")),  # of float64
        (ValueError, lambda x, y: mmd2(x.expand(2, 6, 4), y)),
        (ValueError, lambda x, y: mmd2(x, y, x_starts=torch.tensor([0, 6]))),
        (ValueError, lambda x, y: ragged(x, y, [0, 3, 5], [0, 3, 6])),
        (ValueError, lambda x, y: ragged(x, y, [0, 3, 6], [0, 6])),
        (ValueError, lambda x, y: ragged(x, y, [0, 6, 6], [0, 3, 6])),
        (ValueError, lambda x, y: ragged(x, y, [0, 1, 6], [0, 3, 6], estimator="unbiased")),
        (ValueError, lambda x, y: ragged(x, y, [0, 6], [0, 6], estimator="block")),
        (TypeError, lambda x, y: mmd2(x.long(), y)),
        (TypeError, lambda x, y: mmd2(x, y, "rbf")),
    ],
)
def test_bad_input(error, call):
    with pytest.raises(error):
        call(*fixture())


def test_polynomials_that_are_none():
    for degree in (0, 2.5, 3.0):
        with pytest.raises(ValueError, match="degree"):
            Polynomial(degree)
    two = torch.tensor([1.0, 2.0])
    for kernel in (Polynomial(2, two), Polynomial(2, coef0=two), Linear(two), Energy(two)):
        with pytest.raises(ValueError, match="one element"):
            mmd2(torch.randn(5, 3), torch.randn(4, 3), kernel)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_linear_away_from_the_origin(estimator):
    x, y = torch.randn(400, 8) + 1000, torch.randn(300, 8) + 1000
    weights = {"x_weight": torch.rand(400), "y_weight": torch.rand(300)}
    exact = mmd2(x.double(), y.double(), Linear(), estimator=estimator, **weights)
    found = mmd2(x, y, Linear(), estimator=estimator, **weights)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_sums_of_kernels_away_from_the_origin():
    x, y = torch.randn(40, 8), torch.randn(40, 8) + 0.3
    kernel = RBF(2.0) + Linear(0.0)
    far = mmd2_and_variance(x + 1000, y + 1000, kernel)
    for one, other in zip(far, mmd2_and_variance((x + 1000).double(), (y + 1000).double(), kernel)):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    statistic, _ = mmd_permutation_test(x + 1000, y + 1000, kernel, 1, generator=generator)
    exact = mmd2((x + 1000).double(), (y + 1000).double(), kernel, estimator="unbiased")
    torch.testing.assert_close(statistic, exact, rtol=1e-3, atol=1e-6)


def test_one_problem_alone():
    x = torch.randn(4, 6, 7)
    for f in (median_heuristic, lambda x, y: mmd2_and_variance(x, y, RBF()),
              lambda x, y: mmd_permutation_test(x, y, RBF())):  # fmt: skip
        with pytest.raises(ValueError, match=r"\[M, D\], not"):
            f(x, x)
    with pytest.raises(ValueError, match="one problem or more"):
        mmd2(x[:0], x[:0])
