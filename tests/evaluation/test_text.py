"""BLEU against counts made by hand; perplexity of chance."""

import math

import pytest
import torch

from fastxm.evaluation.metrics import class_score
from fastxm.evaluation.text import bleu, common_words, perplexity, shared_words


def test_bleu_counts_clipped_runs():
    # the textbook's: seven times "the", of which the references hold two
    references = [list(map(str.split, ("the cat is on the mat", "there is a cat on the mat")))]
    assert bleu([["the"] * 7], references, 1) == pytest.approx(2 / 7)
    assert bleu([["the"] * 7], references, 2) == 0
    # of the pairs "the cat", "cat on", "on the", "the mat" all are in one reference or the other;
    # five words are one short of the nearest reference
    text = ["the", "cat", "on", "the", "mat"]
    assert bleu([text], references, 2) == pytest.approx(math.exp(1 - 6 / 5))


def test_bleu_is_of_the_corpus():
    texts, references = [["a", "b"], ["c", "x", "y"]], [[["a", "b"]], [["c", "d", "e"]]]
    assert bleu(texts, references, 1) == pytest.approx(3 / 5)
    assert bleu([["a", "b"], ["c", "d", "e"]], references, 2) == 1
    assert bleu([[]], [[["a"]]], 1) == 0


def test_bleu_needs_references():
    for texts, references in ([["a"]], []), ([["a"]], [[]]), ([], []):
        with pytest.raises(ValueError, match="one or more references"):
            bleu(texts, references)


def test_shared_words_leaves_common_ones_out():
    texts, references = [["a", "red", "frog"], ["a", "a"]], [[["a", "frog"], ["b"]], [["a"]]]
    assert shared_words(texts, references, {"a"}) == pytest.approx(1 / 2)
    assert shared_words(texts, references, set()) == pytest.approx(3 / 4)
    assert shared_words([["a"]], [[["a"]]], {"a"}) == 0


def test_common_words():
    captions = [["a", "frog"], ["a", "cat", "cat"], ["a"], ["a"]]
    assert common_words(captions, 0.5) == {"a"}
    assert common_words(captions, 0.2) == {"a", "frog", "cat"}


def test_perplexity_of_chance_is_the_number_of_words():
    nll = torch.full((2, 4), math.log(10.0))
    nll[1, 2:] = 0
    assert perplexity(nll, torch.tensor([3, 1])) == pytest.approx(10)


def test_class_score():
    sure = 100 * torch.eye(5).repeat(20, 1)
    mean, spread = class_score(sure, 10)
    assert (mean, spread) == (pytest.approx(5), pytest.approx(0, abs=1e-6))
    assert class_score(torch.zeros(20, 5), 2)[0] == pytest.approx(1)
    assert class_score(100 * torch.eye(5)[:1].repeat(20, 1), 2)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="2 parts or more"):
        class_score(sure[:3], 5)
