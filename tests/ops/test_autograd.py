"""What PyTorch does with ops beside calling them: checkpoints, autocast of second derivatives,
batched gradients, torch.func, forward mode."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastxm.ops import backend, info_nce, mmd2, modulation, region_word_scores
from fastxm.ops.info_nce_views import info_nce_views
from fastxm.ops.mmd import RBF, Polynomial
from fastxm.ops.mmd_variance import mmd2_and_variance
from fastxm.ops.siglip import siglip

torch.manual_seed(0)
Y = torch.randn(6, 4)
WORDS, LENGTHS = torch.randn(6, 5, 4), torch.tensor([5, 3, 1, 2, 4, 5])
MAPS = torch.randn(2, 6, 4, 2, 2)

OPS = {
    "info_nce": lambda x: info_nce(x, Y, 2.0, normalize=True),
    "views": lambda x: info_nce_views(x, Y, 2.0).square().sum(),
    "siglip": lambda x: siglip(x, Y, 2.0, -1.0),
    "mmd2": lambda x: mmd2(x, Y),
    "polynomial": lambda x: mmd2(x, Y, Polynomial(2)),
    "variance": lambda x: mmd2_and_variance(x, Y, RBF(2.0))[1],
    "region_word": lambda x: region_word_scores(x[:, None] + WORDS, WORDS, LENGTHS).tanh().sum(),
    "softmax of words": lambda x: region_word_scores(
        x[:, None] + WORDS, WORDS, LENGTHS, word_softmax=True
    ).tanh().sum(),
    "modulation": lambda x: modulation(
        x[:, :, None, None].expand(-1, -1, 4, 4) ** 2, *MAPS, norm="batch"
    ).square().sum(),
}  # fmt: skip


def leaf():
    return torch.linspace(-1, 2, 24).sin().view(6, 4).requires_grad_()


@pytest.mark.parametrize("name", OPS)
def test_checkpoint(name):
    x = leaf()
    (whole,) = torch.autograd.grad(OPS[name](x), x)
    checkpoint(OPS[name], x, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, whole)


@pytest.mark.parametrize("name", [name for name in OPS if name != "modulation"])
def test_autocast_does_not_round_second_derivatives(name):
    # a backward itself is run outside of autocast, as PyTorch asks for
    def derivatives(x, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = torch.autograd.grad(OPS[name](x), x, create_graph=True)[0]
        return first, torch.autograd.grad(first.square().sum(), x)[0]

    for one, other in zip(derivatives(leaf(), True), derivatives(leaf(), False)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("name", ["info_nce", "region_word"])
def test_batched_gradients(name):
    x, cotangents = leaf(), torch.tensor([1.0, -2.0])
    found = torch.autograd.grad(OPS[name](x), x, cotangents, is_grads_batched=True)[0]
    one = torch.autograd.grad(OPS[name](x), x)[0]
    torch.testing.assert_close(found, cotangents[:, None, None] * one)


META = [name for name in OPS if name not in ("region_word", "softmax of words", "modulation")]


@pytest.mark.parametrize("name", META)
def test_meta(name, monkeypatch):
    x = torch.empty(6, 4, device="meta", requires_grad=True)
    monkeypatch.setitem(globals(), "Y", torch.empty(6, 4, device="meta"))
    loss = OPS[name](x)
    loss.backward()
    assert loss.device.type == x.grad.device.type == "meta"


def gradient(f, x):
    return torch.autograd.grad(f(x), x)[0]


@pytest.mark.parametrize("name", OPS)
def test_gradient_is_the_same_whether_or_not_a_second_one_is_asked_for(name):
    x = leaf()
    first = torch.autograd.grad(OPS[name](x), x, create_graph=True)[0]
    assert first.requires_grad
    assert torch.equal(first, gradient(OPS[name], leaf()))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", OPS)
def test_functional_gradients(name):
    f, x = OPS[name], leaf()
    both = torch.stack([leaf(), -leaf()]).detach()
    each = torch.stack([gradient(f, x.clone().requires_grad_()) for x in both])
    close(torch.func.grad(f)(x.detach()), each[0])
    close(torch.func.vmap(f)(both), torch.stack([f(x) for x in both]))
    close(torch.func.vmap(torch.func.grad(f))(both), each)
    close(torch.func.functionalize(f)(x.detach()), f(x))
    value, back = torch.func.vjp(f, x.detach())
    close(back(2 * torch.ones_like(value))[0], 2 * each[0])


@pytest.mark.parametrize("name", OPS)
def test_forward_mode(name):
    f, x, t = OPS[name], leaf(), torch.linspace(1, -1, 24).view(6, 4)
    along = (gradient(f, x) * t).sum()
    value, tangent = torch.func.jvp(f, (x.detach(),), (t,))
    close(value, f(x))
    close(tangent, along)
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(x, t))
        close(torch.autograd.forward_ad.unpack_dual(dual).tangent, along)
    # of a gradient too, which is linear in what it is given
    value, back = torch.func.vjp(f, x.detach())
    one, two = torch.ones_like(value), torch.full_like(value, 2)
    close(torch.func.jvp(lambda c: back(c)[0], (one,), (two,))[1], 2 * back(one)[0])
    value = f(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.grad(value, x, torch.autograd.forward_ad.make_dual(one, two))[0]
        close(torch.autograd.forward_ad.unpack_dual(dual).tangent, 2 * back(one)[0])
    compiled = torch.compile(lambda x: torch.func.jvp(f, (x,), (t,))[1], backend="eager")
    close(compiled(x.detach()), along)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("way", ["rr", "fr", "rf", "ff", "of a dead transform", "of a cotangent"])
def test_functional_second_derivatives(name, way):
    f, x = OPS[name], leaf()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    rows = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in first.flatten()]
    wanted, x = torch.stack(rows).view(6, 4, 6, 4), x.detach()
    if way == "of a dead transform":
        back = torch.func.vjp(torch.func.grad(f), x)[1]
        close(back(torch.ones_like(x))[0], wanted.sum((0, 1)))
    elif way == "of a cotangent":  # in which the gradient is linear
        value, back = torch.func.vjp(f, x)
        close(torch.func.grad(lambda c: back(c)[0].sum())(torch.ones_like(value)), first.sum())
    else:
        outer, inner = ({"r": torch.func.jacrev, "f": torch.func.jacfwd}[kind] for kind in way)
        close(outer(inner(f))(x), wanted)


def test_third_derivatives():
    f = OPS["info_nce"]

    def third(x):
        first = torch.autograd.grad(f(x), x, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(second.square().sum(), x)[0]

    with backend("reference"):
        wanted = third(leaf())
    close(third(leaf()), wanted)
