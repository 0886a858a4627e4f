import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse, peak_bytes

from fastxm.ops import siglip_pairs
from fastxm.ops.siglip import loss_of, siglip

SHAPES = [(1, 1), (7, 3), (33, 65), (130, 17)]  # N, D


def formula(x, y, scale, bias):
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = scale * x.to(dtype) @ y.to(dtype).T + bias
    signs = 2 * torch.eye(len(x), dtype=dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(x)


def inputs(N, D, dtype=torch.float32):
    x, y = F.normalize(torch.randn(2, N, D), dim=2).to(dtype)
    return x, y, torch.tensor(12.3), torch.tensor(-3.1)


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr(siglip_pairs, "BLOCK", 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, dtype):
    no_worse(siglip, formula, *inputs(*shape, dtype))
    with torch.no_grad():
        no_worse(siglip, formula, *inputs(*shape, dtype))
    no_worse(gradient(siglip), gradient(formula), *inputs(*shape, dtype))


def test_gradients_of_scalars():
    # a single number can be right by luck: thirty of them
    def thirty(f):
        f = gradient(f, wrt=(2, 3))
        return lambda x, y, *scalars: [torch.stack(f(a, b, *scalars)) for a, b in zip(x, y)]

    x, y, *scalars = inputs(30 * 33, 20)
    no_worse(
        lambda *t: torch.stack(thirty(siglip)(*t)), lambda *t: torch.stack(thirty(formula)(*t)),
        x.view(30, 33, 20), y.view(30, 33, 20), *scalars,
    )  # fmt: skip


def test_derivatives(monkeypatch):
    monkeypatch.setattr(siglip_pairs, "BLOCK", 1)
    leaves = [t.double().requires_grad_() for t in inputs(19, 2)]
    assert torch.autograd.gradcheck(siglip, leaves)
    assert torch.autograd.gradgradcheck(siglip, leaves)
    torch.testing.assert_close(siglip(*leaves), formula(*leaves), rtol=1e-14, atol=0)


def test_large_logits():
    x, y, _, bias = inputs(50, 40)
    scale = torch.tensor(300.0)
    no_worse(siglip, formula, x, y, scale, bias)
    no_worse(gradient(siglip), gradient(formula), x, y, scale, bias)


def test_memory_is_linear():
    N, D = 2048, 4
    x, y = torch.randn(2, N, D, requires_grad=True)
    peak = peak_bytes(lambda: siglip(x, y, 1.0, -1.0).backward())
    # a few blocks of the least rows, where one matrix would have 2048
    assert peak < 8 * 16 * N * 4


def test_empty_and_wrong_inputs():
    x = torch.empty(0, 4, requires_grad=True)
    assert siglip(x, x, 1.0).isnan()
    for wrong in (torch.ones(3, 5), torch.ones(4, 4), torch.ones(3)):
        with pytest.raises(ValueError, match="siglip needs"):
            siglip(torch.ones(3, 4), wrong, 1.0)
    with pytest.raises(TypeError, match="floating"):
        siglip(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.long), 1.0)


def test_dispatch():
    tensors = [t.requires_grad_() for t in inputs(6, 5)]
    for gradients in (True, False):
        given = tensors if gradients else [t.detach() for t in tensors]
        torch.library.opcheck(loss_of, (*given, gradients))
    compiled = torch.compile(siglip, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), siglip(*tensors))
    x, y, *scalars = inputs(6, 5, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = siglip(x, y, *scalars)
    torch.testing.assert_close(out, siglip(x.float(), y.float(), *scalars))
