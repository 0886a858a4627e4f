"""Random shapes and options against NumPy in float64."""

import numpy as np
import pytest
import torch
from test_region_word import formula

from fastxm.ops import region_word_scores

CASES = 200
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def unit_bwd(grad, x):
    u = unit(x)
    return (grad - (grad * u).sum(1, keepdims=True) * u) / np.linalg.norm(x, axis=1, keepdims=True)


def pair(regions, words, sharp, pool, word_softmax):
    """The score of one text and one picture, and its gradients."""
    v, w = (regions, words) if word_softmax else (unit(regions), unit(words))
    s = w @ v.T
    beta = softmax(s, 0) if word_softmax else s
    alpha = softmax(sharp * beta, 1)
    c = alpha @ v
    m = (unit(w) * unit(c)).sum(1, keepdims=True)
    top = pool * m.max()
    score = (top + np.log(np.exp(pool * m - top).sum())) / pool
    dm = softmax(pool * m, 0)
    dc, dw = unit_bwd(dm * unit(w), c), unit_bwd(dm * unit(c), w)
    dalpha = dc @ v.T
    ds = sharp * alpha * (dalpha - (alpha * dalpha).sum(1, keepdims=True))
    if word_softmax:
        ds = beta * (ds - (beta * ds).sum(0))
    dw, dv = dw + ds @ v, ds.T @ w + alpha.T @ dc
    return (score, dv, dw) if word_softmax else (score, unit_bwd(dv, regions), unit_bwd(dw, words))


def truth(regions, words, lengths, dscores, *options):
    regions, words = (t.detach().double().numpy() for t in (regions, words))
    scores = np.full((len(words), len(regions)), -np.inf)
    dregions, dwords = np.zeros_like(regions), np.zeros_like(words)
    for t, n in enumerate(lengths.tolist()):
        for i in range(len(regions) if n else 0):
            scores[t, i], dr, dw = pair(regions[i], words[t, :n], *options)
            dregions[i] += dscores[t, i].item() * dr
            dwords[t, :n] += dscores[t, i].item() * dw
    return [scores, dregions, dwords]


def case(seed, dtype):
    random = np.random.default_rng(seed)
    B_image, B_text = random.integers(1, 4, 2)
    T, R, D = random.integers(1, 21), *random.integers(1, 301, 2)
    if seed % 10 == 0:  # many words of few features: |c|^2 by way of r rᵀ
        B_text, T, R, D = 16, 20, 40, 100
    word_softmax = bool(random.integers(2))
    regions, words = (random.standard_normal((*shape, D)) for shape in ((B_image, R), (B_text, T)))
    words *= D**-0.5 if word_softmax else 1  # else its softmax over words is that of one
    lengths = torch.from_numpy(random.integers(0, T + 1, B_text))
    dscores = torch.from_numpy(random.standard_normal((B_text, B_image)))
    dscores[lengths == 0] = 0
    options = (float(random.uniform(1, 8)), float(random.uniform(1, 8)), word_softmax)
    given = [torch.from_numpy(t).to(dtype).requires_grad_() for t in (regions, words)]
    return (*given, lengths, dscores), options


def results(f, regions, words, lengths, dscores, options):
    names = ("attention_sharpness", "pooling_sharpness", "word_softmax")
    scores = f(regions, words, lengths, **dict(zip(names, options)))
    return [scores, *torch.autograd.grad(scores, (regions, words), dscores.to(scores))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_and_options(dtype):
    errors = []  # of ours and of plain PyTorch, in roundings of the largest value
    for seed in range(CASES):
        given, options = case(seed, dtype)
        found = [results(f, *given, options) for f in (region_word_scores, formula)]
        for true, *outputs in zip(truth(*given, *options), *found):
            ours, plain = (o.detach().double().numpy() for o in outputs)
            assert (np.isfinite(ours) == np.isfinite(true)).all()
            there = np.isfinite(true)
            largest = max(np.abs(true[there]).max(initial=0), 1e-3)
            rounding = torch.finfo(outputs[0].dtype).eps * largest
            errors.append(
                [np.abs(o[there] - true[there]).max(initial=0) / rounding for o in (ours, plain)]
            )
    ours, plain = np.array(errors).T
    assert np.sqrt((ours**2).mean()) <= 2 * np.sqrt((plain**2).mean()) + 1
    assert ours.max() <= 2 * plain.max() + 1
