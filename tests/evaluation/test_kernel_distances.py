"""KID and CMMD against the calculations that others do, written out, on the same features."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fastxm.evaluation import cmmd, kid
from fastxm.ops import backend, mmd2
from fastxm.ops.mmd import RBF, Laplace, Linear, Polynomial
from fastxm.ops.mmd_stream import streamed_mmd2


def features(rows, width, shift=0.0):
    return torch.relu(torch.randn(rows, width) + shift)  # as pooled features are


def fidelity_kid(a, b, subsets, size, seed):
    """torch-fidelity's calculation: NumPy's legacy generator, sums less traces."""
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = a[random.choice(len(a), size, replace=False)]
        y = b[random.choice(len(b), size, replace=False)]
        xx, yy, xy = (((p @ q.T) / x.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        found.append(within - 2 * xy.sum() / size**2)
    return np.mean(found), np.std(found)


def clip_mmd(x, y):
    """CMMD's calculation: the biased estimator of one Gaussian of width 10, times 1000."""
    gamma = 1 / (2 * 10**2)
    xx, yy, xy = (np.exp(-gamma * ((p[:, None] - q) ** 2).sum(-1)).mean()
                  for p, q in ((x, x), (y, y), (x, y)))  # fmt: skip
    return 1000 * (xx + yy - 2 * xy)


def test_kid_is_that_of_others(tmp_path):
    a, b = features(300, 40), features(200, 40, 0.3)
    expected = fidelity_kid(a.double().numpy(), b.double().numpy(), 7, 64, 2020)
    found = kid(a, b, subsets=7, subset_size=64)
    assert found == pytest.approx(expected, rel=1e-9)
    np.save(tmp_path / "a.npy", a.numpy())
    assert kid(tmp_path / "a.npy", b.numpy(), subsets=7, subset_size=64) == found
    assert kid(a, b, subsets=7, subset_size=64, seed=1) != found


def test_kid_of_one_distribution_is_about_zero():
    mean, std = kid(features(400, 30), features(400, 30), subsets=20, subset_size=200)
    assert abs(mean) < 3 * std


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_cmmd_is_that_of_others(block, tmp_path):
    x, y = (normalize(features(n, 16, s)) for n, s in ((150, 0), (97, 0.4)))
    np.save(tmp_path / "x.npy", x.numpy())
    expected = clip_mmd(x.double().numpy(), y.double().numpy())
    assert cmmd(tmp_path / "x.npy", y, block=block) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("unbiased", [False, True])
def test_streams_are_samples(unbiased, device):
    x, y = (torch.randn(n, 5, dtype=torch.float64) + s for n, s in ((90, 3), (70, 2)))
    kernel = RBF((1, 2)) + Laplace(2.0) + Polynomial() + Linear(0.1)
    whole = mmd2(x, y, kernel, estimator="unbiased" if unbiased else "biased")
    options = {"unbiased": unbiased, "block": 32, "device": device, "dtype": torch.float64}
    for name in ("reference", device):
        with backend(name):
            torch.testing.assert_close(streamed_mmd2(x, y, kernel, **options).cpu(), whole)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kid(x, x[:, :2]),
        lambda x: kid(x, x, subset_size=11),
        lambda x: kid(x, x, subset_size=1),
        lambda x: kid(x, x, subsets=0, subset_size=5),
        lambda x: cmmd(x, x[:0]),
        lambda x: cmmd(x[0], x),
        lambda x: streamed_mmd2(x, x[:1], RBF(), unbiased=True),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError):
        call(torch.randn(10, 3))
