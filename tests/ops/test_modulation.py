"""Modulation against batch_norm, group_norm, interpolate and relu of torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse
from formulas import modulation_formula as formula
from torch.autograd import gradcheck, gradgradcheck

from fastxm.ops import backend, modulation
from fastxm.ops.modulation import _bwd, _fwd

# B, C, h, w, k: odd sizes, vectors and their tails, one pixel a cell, one cell a plane; the last is
# large enough that its sums are split
SHAPES = [(1, 1, 1, 1, 2), (2, 3, 5, 3, 1), (3, 19, 2, 3, 4), (2, 33, 1, 1, 24), (2, 8, 4, 2, 16),
          (1, 2, 1, 1, 96)]  # fmt: skip
FEW_CHANNELS = [
    (1, 1, 1, 1, 2),
    (2, 3, 2, 3, 1),
    (2, 5, 2, 3, 3),
    (1, 2, 1, 1, 96),
    (1, 3, 2, 4, 16),
]
NORMS = ["batch", "instance", "layer", "none"]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
          (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
          (torch.float32, torch.bfloat16)]  # fmt: skip


def inputs(shape, device="cpu", dtype=torch.float32, maps=torch.float32, last=False):
    B, C, h, w, k = shape
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(B, C, h * k, w * k) * 2 + 3
    gamma, beta = torch.randn(2, B, C, h, w) / 2
    return x.to(device, dtype, memory_format=order), gamma.to(device, maps), beta.to(device, maps)


def with_norm(f, norm="batch", activation="relu"):
    return lambda *maps: f(*maps, norm=norm, activation=activation)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, norm, last, device):
    x, gamma, beta = inputs(shape, device, last=last)
    no_worse(with_norm(modulation, norm), with_norm(formula, norm), x, gamma, beta)
    assert modulation(x, gamma, beta).stride() == x.stride()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, norm, last, device):
    maps = inputs(shape, device, last=last)
    ours, plain = (gradient(with_norm(f, norm), (0, 1, 2)) for f in (modulation, formula))
    no_worse(ours, plain, *maps)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes, last, device):
    x, gamma, beta = inputs(SHAPES[2], device, *dtypes, last=last)
    out = modulation(x, gamma, beta)
    assert out.dtype == x.dtype
    no_worse(modulation, formula, x, gamma, beta)
    no_worse(gradient(modulation, (0, 1, 2)), gradient(formula, (0, 1, 2)), x, gamma, beta)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", FEW_CHANNELS)
def test_triton(shape, last, device):
    maps = inputs(shape, device, last=last)
    with backend("triton"):
        no_worse(modulation, formula, *maps)
        for norm, activation in (("batch", "relu"), ("layer", "none")):
            pair = (with_norm(f, norm, activation) for f in (modulation, formula))
            no_worse(*(gradient(f, (0, 1, 2)) for f in pair), *maps)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_derivatives(norm, last, device):
    x, gamma, beta = (t.double() for t in inputs((2, 3, 2, 1, 2), device, last=last))
    maps = [t.requires_grad_() for t in (x, gamma, beta)]
    assert gradcheck(with_norm(modulation, norm), maps)
    assert gradgradcheck(with_norm(modulation, norm, "none"), maps)
    assert gradgradcheck(with_norm(modulation, norm), maps)


@pytest.mark.parametrize("last", [False, True])
def test_running_statistics(last, device):
    x, gamma, beta = inputs((3, 5, 2, 2, 2), device, last=last)
    ours, theirs = torch.nn.BatchNorm2d(5).to(device), torch.nn.BatchNorm2d(5).to(device)
    running = {"running_mean": ours.running_mean, "running_var": ours.running_var}
    for _ in range(2):
        modulation(x, gamma, beta, **running)
        theirs(x)
    n = x.numel() // 5
    unbiased = 0.81 + (ours.running_var - 0.81) * n / (n - 1)  # ours keeps the biased variance
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(unbiased, theirs.running_var)

    def evaluate(x, gamma, beta):
        dtype = {name: t.to(x.dtype) for name, t in running.items()}
        z = F.batch_norm(x, dtype["running_mean"], dtype["running_var"])
        size = x.shape[2:]
        return F.relu(z * (1 + F.interpolate(gamma, size)) + F.interpolate(beta, size))

    def ours_evaluates(*maps):
        return modulation(*maps, **running, training=False)

    no_worse(ours_evaluates, evaluate, x, gamma, beta)
    no_worse(gradient(ours_evaluates, (0, 1, 2)), gradient(evaluate, (0, 1, 2)), x, gamma, beta)


def test_dispatch(device):
    for last in (False, True):
        x, gamma, beta = inputs(SHAPES[2], device, last=last)
        mean, var = torch.zeros(2, 1, 19, 1, 1, device=device).unbind()
        leaves = [t.requires_grad_() for t in (x, gamma, beta)]
        for given, axes in (
            ((None, None), [0, 2, 3]),
            ((None, None), [1, 2, 3]),
            ((mean, var), []),
        ):
            torch.library.opcheck(_fwd, (*leaves, *given, axes, 1e-5, True))
        detached = [t.detach() for t in (x, *leaves)]
        torch.library.opcheck(_bwd, (*detached, mean, var, [0, 2, 3], 1e-5, True))


def test_compiles_whole(device):
    x, gamma, beta = (t.requires_grad_() for t in inputs(SHAPES[2], device, last=True))
    eager, compiled = torch.zeros(19, device=device), torch.zeros(19, device=device)

    def step(running):
        out = modulation(x * 2, gamma, beta, running_mean=running, running_var=running + 1)
        return out, *torch.autograd.grad(out.square().sum(), (x, gamma, beta))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(x, gamma, beta, running):
        return modulation(x * 2, gamma, beta, running_mean=running, running_var=running + 1)

    out = forward(x, gamma, beta, compiled)
    found = out, *torch.autograd.grad(out.square().sum(), (x, gamma, beta))
    for a, b in zip(found, step(eager)):
        assert torch.equal(a, b)
    assert torch.equal(eager, compiled)


def test_autocast_takes_dtypes_as_given(device):
    x, gamma, beta = inputs(SHAPES[1], device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(modulation(x, gamma, beta), modulation(x, gamma, beta))
        assert modulation(x.float(), gamma, beta).dtype == torch.float32


def test_forced_backend(device):
    maps = inputs(SHAPES[2], device)
    with backend("reference"):
        plain = modulation(*maps)
    assert not torch.equal(plain, modulation(*maps)), "the fused passes do not run by themselves"
    torch.testing.assert_close(plain, modulation(*maps))
    if device == "cpu":
        with pytest.raises(RuntimeError, match="cuda"), backend("cuda"):
            modulation(*maps)


def test_two_runs_and_any_thread_count_give_the_same_bits(device):
    before = torch.get_num_threads()
    results = []
    for last in (False, True):
        x, gamma, beta = inputs((3, 7, 2, 2, 8), device, last=last)
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            results.append(gradient(modulation, (0, 1, 2))(x, gamma, beta))
    torch.set_num_threads(before)
    for first, *others in (results[:3], results[3:]):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("last", [False, True])
def test_extremes(last, device):
    # a mean far from zero: a float32 sum of squares would lose the variance
    x, gamma, beta = inputs((2, 4, 2, 2, 16), device, last=last)
    no_worse(modulation, formula, x * 0.01 + 1000, gamma, beta)
    # a constant channel has variance zero
    out = modulation(torch.full_like(x, 7.0), gamma, beta, activation="none")
    assert torch.equal(out, F.interpolate(beta, x.shape[2:]))
    # NaN and infinity are not hidden
    x[0, 0, 0, 0] = float("nan")
    out = modulation(x, gamma, beta)
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


@pytest.mark.filterwarnings("ignore:var_mean")
def test_empty(device):
    x = torch.zeros(0, 3, 4, 4, device=device, requires_grad=True)
    gamma = torch.zeros(0, 3, 2, 2, device=device)
    out = modulation(x, gamma, gamma, norm="instance")
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape


def test_any_strides(device):
    x, gamma, beta = inputs((2, 6, 2, 2, 4), device)
    wide = torch.cat([x, x], 1)[:, ::2]
    both = torch.cat([gamma, beta], 1).to(memory_format=torch.channels_last)
    expected = formula(wide, gamma, beta)
    torch.testing.assert_close(modulation(wide, *both.chunk(2, 1)), expected)
    torch.testing.assert_close(modulation(x.mT, gamma.mT, beta.mT), formula(x, gamma, beta).mT)


def test_bad_input():
    x, gamma = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)
    for bad in ((x[0], gamma, gamma), (x, gamma, gamma[:1]), (x, gamma[:, :2], gamma[:, :2]),
                (x[..., :3], gamma, gamma), (x[..., :2], gamma, gamma)):  # fmt: skip
        with pytest.raises(ValueError, match="modulation needs"):
            modulation(*bad)
    with pytest.raises(ValueError, match="norm"):
        modulation(x, gamma, gamma, norm="group")
    with pytest.raises(TypeError, match="floating"):
        modulation(x, gamma.int(), gamma)
    with pytest.raises(TypeError, match="one device"):
        modulation(x, gamma, gamma.to("meta"))
    with pytest.raises(ValueError, match="running_mean"):
        modulation(x, gamma, gamma, training=False)


def test_no_rows_leave_running_statistics():
    maps, mean, var = torch.empty(3, 0, 3, 4, 4), torch.zeros(3), torch.ones(3)
    modulation(*maps, running_mean=mean, running_var=var)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


def test_running_statistics_that_do_not_fit():
    maps = torch.ones(3, 2, 3, 4, 4)
    for given in ({"running_mean": torch.zeros(3)}, {"running_var": torch.ones(3)},
                  {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}):  # fmt: skip
        with pytest.raises(ValueError, match="running_mean and running_var"):
            modulation(*maps, **given)
