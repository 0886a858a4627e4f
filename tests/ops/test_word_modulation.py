"""Word modulation against contexts that are formed, and XMC-GAN's own numbers."""

import pytest
import torch
import torch.nn.functional as F
from check import gradient, no_worse
from torch.autograd import gradcheck, gradgradcheck

from fastxm.ops import word_attention, word_modulation

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 5, 3, 2, 4, 3), (3, 17, 33, 4, 4, 6)]  # B, T, E, h, w, C


def formula(query, words, lengths, table, everywhere, sharpness=15.0):
    q, w = F.normalize(query.flatten(2).mT, dim=-1), F.normalize(words, dim=-1)
    maps = []
    for b, n in enumerate(lengths.tolist()):
        attention = (sharpness * q[b] @ w[b, :n].mT).softmax(-1)  # [h w, n]
        maps.append(attention @ table[b, :n] + everywhere[b])
    maps = torch.stack(maps).mT.unflatten(2, query.shape[2:])
    return maps.chunk(2, 1)


def inputs(shape, device="cpu", last=False):
    B, T, E, h, w, C = shape
    query = torch.randn(B, E, h, w)
    query = query.to(memory_format=torch.channels_last) if last else query
    lengths = torch.randint(1, T + 1, (B,))
    tensors = query, torch.randn(B, T, E), lengths, torch.randn(B, T, 2 * C), torch.randn(B, 2 * C)
    return [t.to(device) for t in tensors]


def golden(shape, a, c):
    count = torch.Size(shape).numel()
    return torch.sin(a * torch.arange(count, dtype=torch.float64) + c).view(shape)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, last, device):
    tensors = inputs(shape, device, last)
    no_worse(word_modulation, formula, *tensors)
    no_worse(gradient(word_modulation, (0, 1, 3, 4)), gradient(formula, (0, 1, 3, 4)), *tensors)


def test_golden_attention_of_xmcgan():
    regions, words = golden((3, 4, 6), 0.7, 0.3), golden((3, 5, 6), 1.3, 0.1)
    query, lengths = regions.mT.unflatten(2, (2, 2)).contiguous(), torch.tensor([3, 5, 2])
    attention = word_attention(query, words, lengths).flatten(2).mT
    expected = torch.tensor([1.1e-05, 0.999989, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(attention[2, 1], expected, rtol=0, atol=1e-6)
    # with the normalised words as the table, gamma is the context
    table = F.normalize(words, dim=-1)
    nothing = torch.zeros(3, 12, dtype=torch.float64)
    context, _ = word_modulation(query, words, lengths, torch.cat([table, table], 2), nothing)
    expected = [0.062789, 0.619170, 0.268466, -0.475542, -0.522879, 0.195803]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(context[0, :, 0, 0], expected, rtol=0, atol=1e-6)
    assert context.sum().item() == pytest.approx(1.0823247, abs=1e-6)


def test_derivatives(device):
    query, words, lengths, *tables = inputs((2, 3, 4, 1, 2, 1), device)
    lengths = torch.tensor([4, 2], device=device)
    words[1, 2:] = 0  # padding, whose norms are zero
    leaves = [t.double().requires_grad_() for t in (query, words, *tables)]

    def f(query, words, *tables):
        return word_modulation(query, words, lengths, *tables, sharpness=3.0)

    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


def test_derivatives_of_zero_rows_are_finite(device):
    query, words, lengths, *tables = inputs((2, 3, 4, 1, 2, 1), device)
    query[0], words[0, 0], lengths[:] = 0, 0, 3
    leaves = [t.requires_grad_() for t in (query, words)]
    gamma, beta = word_modulation(*leaves, lengths, *tables)
    first = torch.autograd.grad((gamma * beta).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert all(g.isfinite().all() for g in (*first, *second))


def test_masked_words_do_not_count(device):
    query, words, lengths, table, everywhere = inputs(SHAPES[2], device)
    lengths = torch.tensor([4, 17, 0], device=device)
    words, table = words.requires_grad_(), table.requires_grad_()
    gamma, beta = word_modulation(query, words, lengths, table, everywhere)
    both = torch.cat([gamma, beta], 1)
    assert torch.equal(both[2], everywhere[2, :, None, None].expand_as(both[2]))
    both.square().sum().backward()
    for grad in (words.grad, table.grad):
        assert grad.isfinite().all()
        assert not grad[0, 4:].any()
        assert not grad[2].any()
        assert grad[0, :4].any()


def test_tables_side_by_side_share_one_attention(device):
    query, words, lengths, table, everywhere = inputs((2, 4, 5, 2, 2, 6), device)
    gamma, _ = word_modulation(query, words, lengths, table, everywhere)
    one = [t.unflatten(-1, (2, 6))[..., :2].flatten(-2) for t in (table, everywhere)]
    torch.testing.assert_close(word_modulation(query, words, lengths, *one)[0], gamma[:, :2])


def test_order_autocast_and_compile(device):
    tensors = inputs(SHAPES[1], device, last=True)
    gamma, _ = word_modulation(*tensors)
    assert gamma.stride(1) == 1
    with torch.autocast(device, torch.bfloat16):
        assert word_modulation(*tensors)[0].dtype == torch.bfloat16
        # the attention itself stays float32: 15 times a rounded cosine is no small error
        assert torch.equal(word_attention(*tensors[:3]), word_attention(*tensors[:3]).float())
        assert word_attention(*tensors[:3]).dtype == torch.float32
    compiled = torch.compile(word_modulation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors)[0], gamma)


def test_bad_input():
    query, words, lengths, table, everywhere = inputs(SHAPES[1])
    for bad in ((query[0], words, lengths), (query, words[..., :2], lengths),
                (query, words, lengths[:1])):  # fmt: skip
        with pytest.raises(ValueError, match="attention needs"):
            word_attention(*bad)
    for bad in ((table[..., :5], everywhere[:, :5]), (table, everywhere[:, :4])):
        with pytest.raises(ValueError, match="word_modulation needs"):
            word_modulation(query, words, lengths, *bad)
