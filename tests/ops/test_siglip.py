import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse, peak_bytes
from torch.overrides import TorchFunctionMode

from fastxm.ops import backend, info_nce, siglip_pairs, siglip_triton
from fastxm.ops.info_nce_views import info_nce_views
from fastxm.ops.siglip import loss_of, siglip

SHAPES = [(1, 1), (7, 3), (33, 65), (130, 17)]  # N, D


def formula(x, y, scale, bias):
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = scale * x.to(dtype) @ y.to(dtype).T + bias
    signs = 2 * torch.eye(len(x), dtype=dtype, device=x.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(x)


def inputs(N, D, device, dtype=torch.float32):
    x, y = F.normalize(torch.randn(2, N, D, device=device), dim=2).to(dtype)
    return x, y, *torch.tensor([12.3, -3.1], device=device)


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr(siglip_pairs, "BLOCK", 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, dtype, device):
    no_worse(siglip, formula, *inputs(*shape, device, dtype))
    with torch.no_grad():
        no_worse(siglip, formula, *inputs(*shape, device, dtype))
    no_worse(gradient(siglip), gradient(formula), *inputs(*shape, device, dtype))


def test_gradients_of_the_mean_fit_into_float16(device):
    # those of the sum do not: 300 rows pull one and the same way, each by 300
    x, y = torch.ones(2, 300, 2, device=device).half()
    leaves = [t.requires_grad_() for t in (x, y)]
    found = torch.autograd.grad(siglip(*leaves, 300.0), leaves)
    truth = torch.autograd.grad(formula(*leaves, 300.0, 0.0), leaves)
    torch.testing.assert_close(found, truth)


def test_gradients_of_scalars(device):
    # a single number can be right by luck: thirty of them
    def thirty(f):
        f = gradient(f, wrt=(2, 3))
        return lambda x, y, *scalars: [torch.stack(f(a, b, *scalars)) for a, b in zip(x, y)]

    x, y, *scalars = inputs(30 * 33, 20, device)
    no_worse(
        lambda *t: torch.stack(thirty(siglip)(*t)), lambda *t: torch.stack(thirty(formula)(*t)),
        x.view(30, 33, 20), y.view(30, 33, 20), *scalars,
    )  # fmt: skip


def test_derivatives(monkeypatch, device):
    monkeypatch.setattr(siglip_pairs, "BLOCK", 1)
    leaves = [t.double().requires_grad_() for t in inputs(19, 2, device)]
    assert torch.autograd.gradcheck(siglip, leaves)
    assert torch.autograd.gradgradcheck(siglip, leaves)
    torch.testing.assert_close(siglip(*leaves), formula(*leaves), rtol=1e-14, atol=0)


def test_large_logits(device):
    x, y, _, bias = inputs(50, 40, device)
    scale = torch.tensor(300.0, device=device)
    no_worse(siglip, formula, x, y, scale, bias)
    no_worse(gradient(siglip), gradient(formula), x, y, scale, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_one(dtype, device):
    x, y, *scalars = inputs(70, 66, device, dtype)
    x[3, 5] = torch.nan
    assert siglip(x, y, *scalars).isnan()
    dx, dy = gradient(siglip)(x, y, *scalars)
    assert dx[3].isnan().all()
    assert dy.isnan().all()
    assert dx[:3].isfinite().all()


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton runs, with several strips of rows."""
    monkeypatch.setattr(siglip_triton, "STRIP", 1)
    with backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (150, 33)], ids=str)
def test_triton(shape, dtype, triton_device):
    if dtype == torch.bfloat16 and triton_device == "cpu":
        pytest.skip("Triton's interpreter multiplies it wrongly")
    test_forward_and_backward(shape, dtype, triton_device)


def test_triton_extremes(triton_device):
    test_gradients_of_the_mean_fit_into_float16(triton_device)
    test_gradients_of_scalars(triton_device)
    test_large_logits(triton_device)
    test_a_nan_stays_one(torch.float32, triton_device)


def test_triton_without_partners(triton_device):
    x, y, *scalars = inputs(40, 9, triton_device)
    found, gradients = siglip_pairs.pair_sums(x, y[:23], *scalars, False, True)
    leaves = [t.requires_grad_() for t in (x, y, *scalars)]
    logits = leaves[2] * leaves[0] @ leaves[1][:23].T + leaves[3]
    truth = F.softplus(logits).sum()
    torch.testing.assert_close(found, truth.detach())
    dx, dy, *others = torch.autograd.grad(truth, leaves)
    torch.testing.assert_close(gradients, (dx, dy[:23], *others))


def test_triton_takes_no_float64(triton_device):
    with pytest.raises(NotImplementedError, match="siglip has no triton backend"):
        siglip(*torch.randn(2, 3, 4, device=triton_device).double(), 1.0)


def test_memory_is_linear():
    N, D = 2048, 64
    x, y = torch.randn(2, N, D, requires_grad=True)
    peak = peak_bytes(lambda: siglip(x, y, 1.0, -1.0).backward())
    # rows, packed or not, their gradients, and blocks of 16 rows; one matrix would have 2048
    assert peak < (8 * D + 4 * 16) * N * 4


def test_empty_and_wrong_inputs():
    x = torch.empty(0, 4, requires_grad=True)
    assert siglip(x, x, 1.0).isnan()
    for wrong in (torch.ones(3, 5), torch.ones(4, 4), torch.ones(3)):
        with pytest.raises(ValueError, match="siglip needs"):
            siglip(torch.ones(3, 4), wrong, 1.0)
    with pytest.raises(TypeError, match="floating"):
        siglip(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.long), 1.0)


class Calls(TorchFunctionMode):
    """The functions of PyTorch that are called, by name."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.names.add(function.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("op", [siglip, info_nce_views, info_nce])
def test_numbers_are_no_copies_from_the_host(op, device):
    # which would wait for a GPU, and fail while a CUDA graph is captured
    x, y, *_ = inputs(6, 5, device)
    with Calls() as calls:
        expected = op(x, y, 2.0)
    assert not calls.names & {"tensor", "as_tensor"}
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(x, y, 2.0)
        graph.replay()
        assert torch.equal(captured, expected)
    with pytest.raises(ValueError, match="logit_scale is a number or one element"):
        op(x, y, torch.ones(2, device=device))


def test_dispatch(device):
    tensors = [t.requires_grad_() for t in inputs(6, 5, device)]
    strided = [t.detach().T.contiguous().T.requires_grad_() for t in tensors[:2]]
    for gradients in (True, False):
        given = [*strided, *tensors[2:]]
        given = given if gradients else [t.detach() for t in given]
        torch.library.opcheck(loss_of, (*given, gradients))
        half = [t.detach().bfloat16() for t in given[:2]]  # of an odd number of features
        torch.library.opcheck(loss_of, (*half, *given[2:], gradients))
    compiled = torch.compile(siglip, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), siglip(*tensors))
    x, y, *scalars = inputs(6, 5, device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        out = siglip(x, y, *scalars)
    torch.testing.assert_close(out, siglip(x.float(), y.float(), *scalars))
