"""Random shapes and options against NumPy in float64."""

import numpy as np
import pytest
import torch
from formulas import info_nce_formula as formula

from fastxm.ops import info_nce

CASES = 200
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth(x, y, scale, *, symmetric, normalize, labels, label_smoothing, offset):
    """Loss [N], and the gradients of its sum to x and y, by NumPy in float64."""
    x, y = (t.detach().double().numpy() for t in (x, y))
    norms = [np.linalg.norm(t, axis=1, keepdims=True) if normalize else 1.0 for t in (x, y)]
    u, v = x / norms[0], y / norms[1]
    N, M = len(x), len(y)
    s, target = scale * u @ v.T, np.arange(N) + offset
    out = np.zeros((N, M), bool)
    if labels is not None:
        out = labels.numpy()[target][:, None] == labels.numpy()[None]
        out[np.arange(N), target] = False
    s[out] = -np.inf

    def direction(s, positive):
        n = len(s)
        top = s.max(1, keepdims=True)
        log_p = s - top - np.log(np.exp(s - top).sum(1, keepdims=True))
        share = np.isfinite(s) / np.isfinite(s).sum(1, keepdims=True)
        target = label_smoothing * share
        target[np.arange(n), positive] += 1 - label_smoothing
        return -(target * np.where(np.isfinite(s), log_p, 0)).sum(1), np.exp(log_p) - target

    loss, ds = direction(s, target)
    if symmetric:
        columns, dt = direction(s.T, np.arange(N))
        loss, ds = (loss + columns) / 2, (ds + dt.T) / 2
    du, dv = scale * ds @ v, scale * ds.T @ u
    if normalize:
        du = (du - (du * u).sum(1, keepdims=True) * u) / norms[0]
        dv = (dv - (dv * v).sum(1, keepdims=True) * v) / norms[1]
    return [loss, du, dv]


def case(seed, dtype):
    random = np.random.default_rng(seed)
    N, D = random.integers(1, 301, 2)
    symmetric = bool(random.integers(2))
    M = N if symmetric else int(random.integers(N, 301))
    labels = torch.from_numpy(random.integers(0, M, M)) if random.integers(2) else None
    options = {
        "symmetric": symmetric,
        "normalize": bool(random.integers(2)),
        "labels": labels,
        "label_smoothing": float(random.choice([0.0, 0.1])),
        "offset": 0 if symmetric else int(random.integers(0, M - N + 1)),
    }
    x, y = (torch.from_numpy(random.standard_normal((n, D))).to(dtype) for n in (N, M))
    scale = float(random.uniform(1, 20)) if options["normalize"] else float(1 / np.sqrt(D))
    return x.requires_grad_(), y.requires_grad_(), scale, options


def results(f, x, y, scale, options):
    loss = f(x, y, scale, reduction="none", **options)
    return [loss, *torch.autograd.grad(loss.sum(), (x, y))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_and_options(dtype):
    errors = []  # of ours and of plain PyTorch, in roundings of the largest value
    for seed in range(CASES):
        x, y, scale, options = case(seed, dtype)
        true = truth(x, y, scale, **options)
        for t, ours, plain in zip(
            true, *(results(f, x, y, scale, options) for f in (info_nce, formula))
        ):
            assert ours.shape == t.shape
            unit = torch.finfo(ours.dtype).eps * max(np.abs(t).max(), 1e-3)
            difference = [np.abs(o.detach().double().numpy() - t).max() for o in (ours, plain)]
            errors.append([d / unit for d in difference])
    ours, plain = np.array(errors).T
    assert np.isfinite(ours).all()
    assert np.sqrt((ours**2).mean()) <= 2 * np.sqrt((plain**2).mean()) + 1
    assert ours.max() <= 2 * plain.max() + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_visible(dtype, bad):
    x, y = torch.randn(70, 9).to(dtype), torch.randn(70, 9).to(dtype)
    x[33, 4] = bad
    x.requires_grad_()
    losses = info_nce(x, y, 2.0, reduction="none", symmetric=False)
    assert not losses[33].isfinite()
    assert losses[:33].isfinite().all()
    assert not info_nce(x, y, 2.0, normalize=True).isfinite()
    total = info_nce(x, y, 2.0)
    assert not total.isfinite()
    (gradient,) = torch.autograd.grad(total, x)
    assert not gradient[33].isfinite().all()
