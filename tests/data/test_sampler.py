"""Claim: draws follow the weights, hold a concept once, and go on from a saved state."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastxm.data import BatchSampler


def dataset(weights, groups, captions=3):
    return SimpleNamespace(
        weights=np.array(weights, np.float64),
        groups=[str(g) for g in groups],
        captions=[["x"] * captions for _ in weights],
    )


def test_no_group_twice_in_a_batch():
    groups = np.arange(60) // 3
    sampler = BatchSampler(dataset(np.ones(60), groups), 16)
    for _ in range(50):
        images, numbers = next(sampler)
        assert images.shape == numbers.shape == (16,)
        assert images.dtype == numbers.dtype == torch.int64
        assert len(set(groups[images])) == 16
        assert 0 <= numbers.min() <= numbers.max() < 3


def test_fewer_groups_than_places():
    groups = np.arange(6) // 2
    sampler = BatchSampler(dataset(np.ones(6), groups), 8)
    for _ in range(20):
        counts = np.bincount(groups[next(sampler)[0]], minlength=3)
        assert sorted(counts) == [2, 3, 3]


def test_draws_follow_the_weights():
    # groups in no order, weights of 0 among them; batches of one have no bias from distinctness
    weights = np.array([1, 0.15, 2, 0.3, 0, 1, 0])
    groups = [5, 1, 5, 0, 1, 2, 9]
    sampler = BatchSampler(dataset(weights, groups), 1, seed=3)
    n = 20_000
    drawn = torch.cat([next(sampler)[0] for _ in range(n)])
    expected = weights / weights.sum()
    frequency = np.bincount(drawn.numpy(), minlength=7) / n
    assert frequency[weights == 0].sum() == 0
    # five standard deviations of a binomial share
    assert (abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


@pytest.mark.parametrize("many", [4, 5])
def test_two_are_drawn_without_replacement_by_weight(monkeypatch, many):
    """P(i, then j) = w_i w_j / (1 - w_i), whether or not each group is looked at."""
    monkeypatch.setattr("fastxm.data.sampler.MANY", many)
    if many == 4:
        monkeypatch.delattr(torch, "multinomial")
    weights = np.array([5, 4, 4, 4, 3])
    w, n = weights / weights.sum(), 20_000
    sampler = BatchSampler(dataset(weights, range(5)), 2, seed=5)
    drawn = torch.stack([next(sampler)[0] for _ in range(n)]).numpy()
    frequency = np.zeros((5, 5))
    np.add.at(frequency, tuple(drawn.T), 1 / n)
    expected = np.outer(w, w) / (1 - w)[:, None]
    np.fill_diagonal(expected, 0)
    assert (abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_more_groups_than_multinomial_takes():
    count = 2**24 + 1
    sampler = object.__new__(BatchSampler)
    sampler.group_weights = torch.ones(count, dtype=torch.float64)
    sampler.group_ends = torch.arange(1, count + 1, dtype=torch.float64)
    sampler.heaviest, sampler.generator = 1.0, torch.Generator().manual_seed(0)
    drawn = sampler.draw_distinct(4096)
    assert len(drawn.unique()) == 4096
    assert 0 <= drawn.min() < count / 8
    assert count * 7 / 8 < drawn.max() < count


def test_caption_numbers_are_even():
    sampler = BatchSampler(dataset(np.ones(40), range(40), captions=4), 20)
    numbers = torch.cat([next(sampler)[1] for _ in range(500)])
    share = torch.bincount(numbers, minlength=4) / len(numbers)
    assert (abs(share - 0.25) <= 5 * (0.25 * 0.75 / len(numbers)) ** 0.5).all()


def test_resume_is_exact(tmp_path):
    data = dataset(np.random.default_rng(0).random(50) + 0.1, np.arange(50) // 2)
    sampler = BatchSampler(data, 7, seed=1)
    for _ in range(5):
        next(sampler)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    expected = [next(sampler) for _ in range(10)]
    other = BatchSampler(data, 7, seed=99)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.batches == 5
    for a, b in zip(expected, [next(other) for _ in range(10)]):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_seed_alone_decides():
    data = dataset(np.ones(50), range(50))
    one, same, other = (BatchSampler(data, 7, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    first = next(one)[0]
    torch.manual_seed(6)
    assert torch.equal(first, next(same)[0])
    assert not torch.equal(first, next(other)[0])


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], []])
def test_nothing_to_draw(weights):
    with pytest.raises(ValueError, match="weights"):
        BatchSampler(dataset(weights, range(len(weights))), 2)


def test_batch_size():
    with pytest.raises(ValueError, match="batch_size"):
        BatchSampler(dataset([1, 1], [0, 1]), 0)
