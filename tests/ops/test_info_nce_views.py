import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse

from fastxm.ops import backend, info_nce_tiles, info_nce_views

SHAPES = [(1, 1), (7, 3), (33, 65), (64, 17)]  # N, D


def formula(x, y, scale):
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = F.normalize(torch.cat([x, y]).to(dtype), dim=1)
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (scale * z @ z.T).masked_fill(~others, -torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(x))
    return F.cross_entropy(logits, partner, reduction="none")


def inputs(N, D, device, dtype=torch.float32):
    x, y = torch.randn(2, N, D, device=device).to(dtype)
    return x, y, torch.tensor(1.7, device=device)


@pytest.fixture
def _leaves(monkeypatch):
    monkeypatch.setattr(info_nce_views, "LEAF", 8)


@pytest.mark.usefixtures("_leaves")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, dtype, device):
    no_worse(info_nce_views.info_nce_views, formula, *inputs(*shape, device, dtype))


@pytest.mark.usefixtures("_leaves")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_backward(shape, dtype, device):
    ours, plain = gradient(info_nce_views.info_nce_views), gradient(formula)
    no_worse(ours, plain, *inputs(*shape, device, dtype))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("normalize", [True, False])
def test_derivatives(name, normalize, monkeypatch):
    monkeypatch.setattr(info_nce_views, "LEAF", 2)
    x, y, scale = (t.double().requires_grad_() for t in inputs(5, 3, "cpu"))

    def f(*tensors):
        return info_nce_views.info_nce_views(*tensors, normalize=normalize)

    with backend(name):
        assert torch.autograd.gradcheck(f, (x, y, scale))
        assert torch.autograd.gradgradcheck(f, (x, y, scale))
    if normalize:
        torch.testing.assert_close(f(x, y, scale), formula(x, y, scale))


@pytest.mark.parametrize("leaf", [4, 16, 64])
def test_half_the_products(leaf, monkeypatch):
    monkeypatch.setattr(info_nce_views, "LEAF", leaf)
    counts = {"sums": 0, "gradients": 0}

    def count(name, first):
        f = getattr(info_nce_tiles, name)

        def counted(*given):
            counts[name] += len(given[first]) * len(given[first + 1])
            return f(*given)

        monkeypatch.setattr(info_nce_tiles, name, counted)

    count("sums", 0)
    count("gradients", 2)
    N = 64
    x, y, scale = inputs(N, 9, "cpu")
    gradient(info_nce_views.info_nce_views)(x, y, scale)
    # half of the pairs of 2 N rows, and half of each square twice
    expected = (2 * N) ** 2 // 2 + N * leaf
    assert counts == {"sums": expected, "gradients": expected}


def test_empty(device):
    x = torch.empty(0, 4, device=device, requires_grad=True)
    losses = info_nce_views.info_nce_views(x, x, 1.0)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert x.grad.shape == (0, 4)


def test_wrong_inputs():
    for wrong in (torch.ones(3, 5), torch.ones(4, 4), torch.ones(3)):
        with pytest.raises(ValueError, match="two views"):
            info_nce_views.info_nce_views(torch.ones(3, 4), wrong, 1.0)
    with pytest.raises(TypeError, match="floating"):
        info_nce_views.info_nce_views(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.long), 1.0)


def test_dispatch(device):
    z, ones = torch.randn(5, 6, device=device).T, torch.ones(6, device=device)
    z, scale = (t.requires_grad_() for t in (z, torch.tensor(2.0, device=device)))
    for normalize in (True, False):
        torch.library.opcheck(info_nce_views.losses_of, (z, scale, normalize))
        given = (ones, z.detach(), scale.detach(), ones, normalize)
        torch.library.opcheck(info_nce_views.gradients_of, given)
    compiled = torch.compile(info_nce_views.info_nce_views, fullgraph=True, backend="aot_eager")
    x, y = z.detach().chunk(2)
    torch.testing.assert_close(compiled(x, y, scale), info_nce_views.info_nce_views(x, y, scale))
