"""Word vectors of a GloVe text file."""

import os

import torch
from torch import Tensor

from fastxm.data.vocabulary import END, SPECIAL, Vocabulary


def word_vectors(
    path: str | os.PathLike[str], vocabulary: Vocabulary, width: int
) -> tuple[Tensor, int]:
    """Vectors of a vocabulary's words from a text file with a word and `width` numbers a line.

    Args:
        path: the file, as GloVe's are.
        vocabulary: whose words are looked for.
        width: E, of the vectors.

    Returns:
        [V, E]; words that the file lacks, the unknown one and the end are drawn with the spread of
        the others. And how many were found.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has another width or no numbers, or none of the words is there.
    """
    rows: dict[int, list[float]] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            word, *numbers = line.rstrip().split(" ")
            if len(numbers) != width:
                raise ValueError(f"{path} has vectors of {len(numbers)} numbers, not {width}")
            number = vocabulary.number.get(word, END)
            if number >= len(SPECIAL):
                rows[number] = [float(value) for value in numbers]
    if not rows:
        raise ValueError(f"{path} has none of the {len(vocabulary)} words")
    found = torch.tensor(list(rows.values()))
    vectors = torch.randn(len(vocabulary), width) * found.std(correction=0)
    vectors[list(rows)] = found
    return vectors, len(rows)
