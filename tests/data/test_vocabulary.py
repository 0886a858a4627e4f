"""Words and numbers: what is known, what is not, what is left out."""

import numpy as np
import pytest
import torch
from fixtures import write_folder

from fastxm.data import open_dataset
from fastxm.data.vocabulary import Tokens, Vocabulary, split_words

CAPTIONS = ["A red apple!", "a red, RED frog", "école 7"]


def test_words_are_runs_of_letters_and_digits_in_lower_case():
    assert split_words("A red-hot apple: O’Clock, 7!") == [
        "a",
        "red",
        "hot",
        "apple",
        "o",
        "clock",
        "7",
    ]
    assert split_words("!? ...") == []


def test_the_most_frequent_word_comes_first():
    vocabulary = Vocabulary.of(CAPTIONS)
    assert vocabulary.words == ("red", "a", "7", "apple", "frog", "école")
    assert len(vocabulary) == 8
    assert Vocabulary.of(CAPTIONS, min_count=2).words == ("red", "a")


def test_captions_as_numbers_and_back():
    vocabulary = Vocabulary.of(CAPTIONS)
    tokens, lengths = vocabulary.encode([*CAPTIONS, "blue frog", "?!", "a a a a a a"], 4)
    assert tokens.tolist() == [
        [3, 2, 5, 0],
        [3, 2, 2, 6],
        [7, 4, 0, 0],
        [1, 6, 0, 0],  # a word that is not known
        [1, 0, 0, 0],  # no word at all
        [3, 3, 3, 3],  # cut at four
    ]
    assert lengths.tolist() == [3, 4, 2, 2, 1, 4]
    assert vocabulary.decode(tokens[:2]) == ["a red apple", "a red red frog"]
    assert vocabulary.decode(tokens[3:4]) == ["<unknown> frog"]


def test_what_is_no_vocabulary_or_no_list():
    for words in ([], ["a", "a"], ["<end>"]):
        with pytest.raises(ValueError, match="one or more words, each once"):
            Vocabulary(words)
    with pytest.raises(TypeError, match="a list of captions"):
        Vocabulary(["a"]).encode("a", 3)


def test_tokens_of_a_data_set(tmp_path):
    dataset = open_dataset(
        write_folder(tmp_path / "p"), 8, cache_dir=tmp_path / "c", progress=False
    )
    vocabulary = Vocabulary.of(text for texts in dataset.captions for text in texts)
    tokens = Tokens(dataset, vocabulary, 6)
    images, numbers = torch.tensor([3, 0]), torch.tensor([1, 0])
    batch = tokens.batch(tokens.row(images, numbers))
    texts = [dataset.captions[3][1], dataset.captions[0][0]]
    assert vocabulary.decode(batch["tokens"]) == [text.lower() for text in texts]
    assert batch["lengths"].tolist() == [len(split_words(text)) for text in texts]
    with pytest.raises(IndexError, match="beyond the picture's captions"):
        tokens.row(np.array([0]), np.array([2]))
