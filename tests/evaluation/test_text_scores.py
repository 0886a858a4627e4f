"""ROUGE-L, the perceptual distance and ranks of retrieval, against values by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastxm.encoders import EfficientNetLite0
from fastxm.evaluation.metrics import retrieval_rank, retrieval_recall
from fastxm.evaluation.perceptual import perceptual_distance
from fastxm.evaluation.rouge import longest_common, rouge_l


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [
        ("police killed the gunman", "police kill the gunman", 3),
        ("the gunman kill police", "police kill the gunman", 2),
        ("a b c d", "d c b a", 1),
        ("", "a", 0),
        ("a b c", "a b c", 3),
    ],
)
def test_longest_common_subsequence(a, b, length):
    assert longest_common(a.split(), b.split()) == length
    assert longest_common(b.split(), a.split()) == length


def test_rouge_l_of_the_paper_s_example():
    # Lin 2004, section 3.1: one word of four is wrong; two of four are in order
    reference = ["police", "killed", "the", "gunman"]
    first, second = ["police", "kill", "the", "gunman"], ["the", "gunman", "kill", "police"]
    assert rouge_l([first], [[reference]]) == 0.75
    assert rouge_l([second], [[reference]]) == 0.5
    assert rouge_l([first, second], [[reference]] * 2) == 0.625


def test_rouge_l_takes_the_best_reference_and_weighs_lengths():
    assert rouge_l([["a", "b"]], [[["x"], ["a", "b", "c", "d"]]]) == pytest.approx(2 * 2 / 6)
    assert rouge_l([[]], [[["a"]]]) == 0
    for texts, references in ([], []), ([["a"]], [[]]), ([["a"]], []):
        with pytest.raises(ValueError, match="one or more references"):
            rouge_l(texts, references)


class Maps(nn.Module):
    def features(self, images):
        return [images, F.avg_pool2d(images, 2)]


def test_perceptual_distance_is_of_directions_at_each_place():
    a, b = torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4)
    expected = torch.zeros(3)
    for x, y in zip(Maps().features(a), Maps().features(b)):
        expected += (2 - 2 * F.cosine_similarity(x, y, dim=1)).mean((1, 2)) / 2
    torch.testing.assert_close(perceptual_distance(Maps(), a, b), expected)
    assert perceptual_distance(Maps(), a, 3 * a).abs().max() < 1e-5
    assert perceptual_distance(Maps(), a[:0], b[:0]).shape == (0,)


def test_perceptual_distance_is_on_the_encoder_s_device():
    images = torch.rand(2, 3, 8, 8)
    assert perceptual_distance(EfficientNetLite0().to("meta"), images, images).is_meta


def test_ranks_count_nearer_wrong_keys():
    keys = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1]])
    query = torch.tensor([[1.0, 0], [1.0, 0], [0.0, 2]])
    ranks = retrieval_rank(query, keys, torch.tensor([0, 2, 2]))
    assert ranks.tolist() == [0, 2, 0]
    assert retrieval_recall(query, keys, torch.tensor([0, 2, 2]), (1, 3)) == {1: 2 / 3, 3: 1.0}
