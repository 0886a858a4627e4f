"""Frechet distance and recall, against closed forms."""

import pytest
import torch

from fastxm.evaluation import FeatureStatistics, frechet_distance, retrieval_recall
from fastxm.evaluation.metrics import frechet


def close(found: float, expected: torch.Tensor) -> None:
    """To the defaults of float64."""
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


def test_statistics_do_not_depend_on_batches():
    features = torch.randn(50, 7, dtype=torch.float64) + 1e4
    streamed = FeatureStatistics(7)
    for part in features.split([1, 0, 30, 19]):
        streamed.update(part)
    assert streamed.count == 50
    torch.testing.assert_close(streamed.mean, features.mean(0))
    torch.testing.assert_close(streamed.covariance, features.T.cov())


def test_distance_of_gaussians_that_commute():
    # with one eigenbasis the trace is sum (sqrt(a) - sqrt(b))^2
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    a, b = torch.rand(2, 6, dtype=torch.float64) + 0.1
    mean = torch.randn(2, 6, dtype=torch.float64)
    expected = (mean[0] - mean[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    covariances = [(basis * values) @ basis.T for values in (a, b)]
    close(frechet_distance(mean[0], covariances[0], mean[1], covariances[1]), expected)


def test_distance_of_gaussians_that_do_not_commute():
    from scipy import linalg

    mean = torch.randn(2, 6, dtype=torch.float64)
    roots = torch.randn(2, 6, 6, dtype=torch.float64)
    c1, c2 = roots @ roots.mT
    middle = torch.from_numpy(linalg.sqrtm((c1 @ c2).numpy()).real)
    expected = (mean[0] - mean[1]).square().sum() + (c1 + c2 - 2 * middle).trace()
    close(frechet_distance(mean[0], c1, mean[1], c2), expected)
    close(frechet_distance(mean[1], c2, mean[0], c1), expected)


def test_distance_with_fewer_rows_than_features():
    width = 40
    features = torch.randn(5, width, dtype=torch.float64)
    one, shifted = FeatureStatistics.of(features), FeatureStatistics.of(features + 2.0)
    # an eigenvalue that should be 0 is off by width * eps of the largest, its root by the root
    off = (width * torch.finfo(torch.float64).eps) ** 0.5
    allowed = 2 * width * off * torch.linalg.matrix_norm(one.covariance, 2).item()
    assert abs(frechet(one, one)) <= allowed
    assert abs(frechet(one, shifted) - width * 2.0**2) <= allowed


def test_statistics_refuse_what_has_none():
    with pytest.raises(ValueError, match="at least 2 rows"):
        FeatureStatistics.of(torch.zeros(1, 3)).covariance.sum()
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics.of(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"\[N, 3\]"):
        FeatureStatistics(3).update(torch.zeros(2, 4))


def test_recall_counts_ranks():
    keys = torch.eye(4)
    query = torch.tensor([[3.0, 1, 0, 0], [3, 2, 1, 0], [1, 2, 3, 4]])
    found = retrieval_recall(query, keys, torch.tensor([0, 1, 0]), ks=(1, 2, 4))
    assert found == {1: 1 / 3, 2: 2 / 3, 4: 1.0}


def test_recall_takes_any_right_key():
    truth = torch.tensor([[False, True, True]])
    keys = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    assert retrieval_recall(torch.tensor([[1.0, 0.5]]), keys, truth, ks=(1, 2)) == {1: 0, 2: 1}


def test_recall_gives_nothing_for_queries_all_alike():
    keys = torch.ones(10, 3) * torch.arange(1, 11)[:, None]
    found = retrieval_recall(torch.ones(10, 3), keys, torch.arange(10), ks=(1, 5, 10))
    assert found == {1: 0, 5: 0, 10: 1}


def test_recall_refuses_truth_of_another_shape():
    with pytest.raises(ValueError, match="truth is"):
        retrieval_recall(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="right key"):
        retrieval_recall(torch.ones(1, 3), torch.ones(4, 3), torch.zeros(1, 4, dtype=torch.bool))
