"""All ops in one compiled loss: one graph, the numbers and gradients of eager code."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from fastxm.ops import info_nce, mmd2, modulation, region_word_scores, word_modulation
from fastxm.ops.mmd import RBF, Laplace, Polynomial, RationalQuadratic
from fastxm.ops.mmd_median import median_heuristic
from fastxm.ops.mmd_variance import mmd2_and_variance
from fastxm.ops.siglip import siglip


def loss(x: Tensor, query: Tensor, words: Tensor, lengths: Tensor, tables: Tensor) -> Tensor:
    gamma, beta = word_modulation(query, words, lengths, tables, tables[:, 0])
    features = modulation(x, gamma, beta)  # [B, C, H, W]
    pooled, sentence = features.mean((2, 3)), words.mean(1)[:, : x.shape[1]]
    scores = region_word_scores(query.flatten(2).transpose(1, 2), words, lengths)
    contrast = info_nce(pooled, sentence, 10.0, normalize=True)
    return contrast + mmd2(pooled, sentence) - scores.diagonal().mean()


def test_one_graph(device):
    B, C, E, T, h, k = 4, 6, 8, 5, 2, 2
    shapes = [(B, C, h * k, h * k), (B, E, h, h), (B, T, E), (B, T, 2 * C)]
    x, query, words, tables = (torch.randn(s, device=device, requires_grad=True) for s in shapes)
    lengths = torch.tensor([5, 1, 3, 4], device=device)
    inputs, leaves = (x, query, words, lengths, tables), (x, query, words, tables)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(*inputs), compiled(*inputs)
    # the same kernels on the same numbers
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), wanted)


@pytest.mark.parametrize("kernel", [RBF((1, 2)), Laplace(2.0) + RationalQuadratic(), Polynomial()])
def test_one_graph_of_any_number_of_rows(device, kernel):
    def loss(x, y):
        regions, words = x.expand(2, -1, -1), y[:, None].expand(-1, 2, -1)  # N regions, N texts
        counts = torch.ones(y.shape[0], dtype=torch.long, device=x.device)
        scores = region_word_scores(regions, words, counts)
        near = mmd2(x, y, RBF(median_heuristic(x, y)), estimator="unbiased")
        pairs = info_nce(x, y, 2.0, normalize=True) + siglip(x, y, 2.0, -1.0)
        return pairs + scores.sum() + mmd2(x, y, kernel) + near + mmd2_and_variance(x, y, kernel)[1]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter), []
    for n in (5, 9, 20):
        x, y = (torch.randn(n, 6, device=device, requires_grad=True) for _ in range(2))
        found, wanted = (torch.autograd.grad(f(x, y), (x, y)) for f in (compiled, loss))
        torch.testing.assert_close(found, wanted)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


def test_functional_gradients_in_a_graph(device):
    x, y = (torch.randn(6, 4, device=device) for _ in range(2))
    gradient = torch.func.grad(lambda x: info_nce(x, y, 2.0, normalize=True) + siglip(x, y, 2.0))
    graph = make_fx(gradient)(x)
    for op in ("info_nce_fwd", "info_nce_bwd", "siglip"):
        assert f"fastxm.{op}.default" in graph.code
    torch.testing.assert_close(graph(y), gradient(y))


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (info_nce, [(3, 4), (3, 4)]),
        (mmd2, [(3, 4), (3, 4)]),
        (modulation, [(2, 3, 4, 4), (2, 3, 2, 2), (2, 3, 2, 2)]),
        (region_word_scores, [(2, 3, 4), (2, 5, 4), (2,)]),
        (word_modulation, [(2, 4, 2, 2), (2, 5, 4), (2,), (2, 5, 6), (2, 6)]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_tensors_of_several_devices(op, shapes):
    tensors = [
        torch.zeros(shape, dtype=torch.long if len(shape) == 1 else None) for shape in shapes
    ]
    for i, tensor in enumerate(tensors):
        mixed = [*tensors[:i], tensor.to("meta"), *tensors[i + 1 :]]
        with pytest.raises(TypeError, match=r"one device, not on (cpu and meta|meta and cpu)"):
            op(*mixed) if op is not info_nce else op(*mixed, 1.0)
