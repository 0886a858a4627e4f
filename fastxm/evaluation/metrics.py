"""Frechet distance between sets of features, and recall of retrieval.

FD = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
tr (C1 C2)^(1/2) = sum_i sqrt(lambda_i),  lambda the eigenvalues of C2^(1/2) C1 C2^(1/2)
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64.

    Args:
        width: D.

    Attributes:
        count: rows seen.
        mean: [D].
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)  # about the mean
        self._root: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """The statistics of one batch [N, D]."""
        return cls(features.shape[1]).update(features)

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Adds features [N, D] (Chan, Golub and LeVeque 1979, merging two samples)."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features are [N, {len(self.mean)}], not {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("features are not finite")
        if len(features) == 0:
            return self
        batch = features.detach().to("cpu", torch.float64)
        total = self.count + len(batch)
        mean = batch.mean(0)
        gap, centred = mean - self.mean, batch - mean
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(gap, gap) * (self.count * len(batch) / total)
        self.mean += gap * (len(batch) / total)
        self.count, self._root = total, None
        return self

    @property
    def covariance(self) -> Tensor:
        """[D, D], unbiased."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def root(self) -> Tensor:
        """[D, D], the symmetric root of the covariance; kept until the next update."""
        if self._root is None:
            self._root = symmetric_root(self.covariance)
        return self._root


def symmetric_root(matrix: Tensor) -> Tensor:
    """The root of a positive semi-definite matrix [D, D]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6).

    Args:
        mean1, mean2: [D].
        cov1, cov2: [D, D], positive semi-definite.
    """
    root = symmetric_root(cov2.double())
    return _distance(mean1.double(), cov1.double(), mean2.double(), root)


def frechet(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance of two sets of features; b's root is worked out once."""
    return _distance(a.mean, a.covariance, b.mean, b.root)


def _distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, root2: Tensor) -> float:
    cross = torch.linalg.eigvalsh(root2 @ cov1 @ root2).clamp(min=0).sqrt().sum()
    traces = cov1.trace() + root2.square().sum()  # tr C2 = |root2|^2
    distance = (mean1 - mean2).square().sum() + traces - 2 * cross
    return max(distance.item(), 0.0)


def retrieval_recall(
    query: Tensor, keys: Tensor, truth: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """R@k: the share of queries with a right key among their k nearest by cosine.

    Args:
        query: [Q, D].
        keys: [M, D].
        truth: [Q] integers, the right key of each query; or [Q, M] booleans, all right keys.
        ks: cut-offs.

    Returns:
        {k: recall in [0, 1]}.
    """
    rank = retrieval_rank(query, keys, truth)
    return {k: (rank < k).double().mean().item() for k in ks}


def retrieval_rank(query: Tensor, keys: Tensor, truth: Tensor) -> Tensor:
    """How many wrong keys are nearer to each query, by cosine, than its nearest right one.

    Args:
        query, keys, truth: as of `retrieval_recall`.

    Returns:
        int64 [Q], 0 where a right key is the nearest. A wrong key as near as the nearest right one
        counts as nearer: queries that are all alike earn nothing.
    """
    truth = truth.to(query.device)
    if truth.ndim == 1:
        truth = torch.nn.functional.one_hot(truth, len(keys)).bool()
    if truth.shape != (len(query), len(keys)):
        raise ValueError(f"truth is [Q] or [Q, M] = {len(query), len(keys)}, not {truth.shape}")
    if not truth.any(1).all():
        raise ValueError("every query needs a right key")
    unit = torch.nn.functional.normalize
    scores = unit(query.double(), dim=1) @ unit(keys.double(), dim=1).T  # [Q, M]
    best = scores.masked_fill(~truth, -torch.inf).amax(1, keepdim=True)
    # cosines of equal rows may differ in their last bits
    return ((scores >= best - 1e-9) & ~truth).sum(1)


def class_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean divergence of each picture's classes from those of all: sure and varied.

    Args:
        logits: [N, K], of a classifier; Inception's are the Inception score (Salimans et al. 2016).
        splits: parts of equal size that are scored alone; what is left over is left out.

    Returns:
        mean and spread (unbiased) over the parts.

    Raises:
        ValueError: fewer than 2 parts, or fewer rows than parts.
    """
    if splits < 2 or len(logits) < splits:
        raise ValueError(f"a score needs 2 parts or more of a row or more, not {len(logits)} rows")
    log_p = logits.double().log_softmax(1)
    parts = log_p[: len(logits) // splits * splits].unflatten(0, (splits, -1))
    mean = parts.exp().mean(1, keepdim=True)
    # a class that no picture is of adds nothing
    divergence = (parts.exp() * (parts - mean.clamp(min=1e-300).log())).sum(2).mean(1)
    scores = divergence.exp()
    return scores.mean().item(), scores.std().item()
