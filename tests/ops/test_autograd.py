"""What PyTorch does with ops beside calling them: checkpoints, autocast of second derivatives,
batched gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastxm.ops import info_nce, mmd2, modulation, region_word_scores
from fastxm.ops.mmd import RBF, Polynomial
from fastxm.ops.mmd_variance import mmd2_and_variance
from fastxm.ops.siglip import siglip

torch.manual_seed(0)
Y = torch.randn(6, 4)
WORDS, LENGTHS = torch.randn(6, 5, 4), torch.tensor([5, 3, 1, 2, 4, 5])
MAPS = torch.randn(2, 6, 4, 2, 2)

OPS = {
    "info_nce": lambda x: info_nce(x, Y, 2.0, normalize=True),
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


@pytest.mark.parametrize("name", OPS)
def test_no_tangent_goes_missing(name):
    # forward mode is not there, and says so
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(leaf(), torch.ones(6, 4))
        with pytest.raises(NotImplementedError, match="jvp"):
            OPS[name](x)
