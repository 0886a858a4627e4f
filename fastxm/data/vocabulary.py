"""Words and their numbers: `Vocabulary`, and the numbered captions of a data set, `Tokens`.

A caption's words are its runs of letters and digits, in lower case. Number 0 is the end of a
caption and the padding after it; number 1 stands for every word that the vocabulary does not have.
There is no start: what reads a caption begins with the picture, or with nothing.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastxm.data.captioned import CaptionedImages

END, UNKNOWN = 0, 1
SPECIAL = ("<end>", "<unknown>")
WORD = re.compile(r"\w+")


def split_words(caption: str) -> list[str]:
    """The words of a caption, in lower case."""
    return WORD.findall(caption.lower())


class Vocabulary:
    """Numbers words.

    Args:
        words: those it knows, in the order of their numbers, which begin at 2.

    Raises:
        ValueError: no word, or one that comes twice.
    """

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.number = {word: i for i, word in enumerate([*SPECIAL, *words])}
        if not words or len(self.number) != len(SPECIAL) + len(words):
            raise ValueError(f"a vocabulary is one or more words, each once, not {len(words)}")

    @classmethod
    def of(cls, captions: Iterable[str], min_count: int = 1) -> "Vocabulary":
        """The words that captions hold at least `min_count` times, the most frequent first."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        words = [word for word, count in counts.items() if count >= min_count]
        return cls(sorted(words, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.number)

    def encode(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Captions as numbers.

        A word that is not known is number 1; words after the first `length` are left out; a
        caption without any word is one unknown word.

        Args:
            captions: B texts.
            length: T, the word slots of a caption.

        Returns:
            tokens [B, T], 0 after the last word, and lengths [B], 1 to T; both int64.
        """
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError("a vocabulary encodes a list of captions (str)")
        tokens = torch.zeros(len(captions), length, dtype=torch.int64)
        lengths = torch.ones(len(captions), dtype=torch.int64)
        for row, caption in enumerate(captions):
            found = [self.number.get(word, UNKNOWN) for word in split_words(caption)][:length]
            found = found or [UNKNOWN]
            tokens[row, : len(found)] = torch.tensor(found)
            lengths[row] = len(found)
        return tokens, lengths

    def decode(self, tokens: Tensor) -> list[str]:
        """Texts of numbers [B, T], each up to the first 0."""
        names = [*SPECIAL, *self.words]
        rows = [row[: row.index(END)] if END in row else row for row in tokens.tolist()]
        return [" ".join(names[i] for i in row) for row in rows]


class Tokens:
    """The numbered captions of a data set.

    Args:
        dataset: gives the captions.
        vocabulary: numbers their words.
        length: T, word slots.
    """

    def __init__(self, dataset: "CaptionedImages", vocabulary: Vocabulary, length: int):
        texts = [caption for captions in dataset.captions for caption in captions]
        self.tokens, self.lengths = vocabulary.encode(texts, length)
        self.starts = np.cumsum([0, *map(len, dataset.captions)])

    def row(self, image: Any, caption: Any) -> Any:
        """The row of caption number `caption` of a picture; both numbers or integer arrays."""
        image, caption = np.asarray(image), np.asarray(caption)
        counts = self.starts[image + 1] - self.starts[image]
        if (caption < 0).any() or (caption >= counts).any():
            raise IndexError("a caption number beyond the picture's captions")
        return self.starts[image] + caption

    def batch(self, rows: Any) -> dict[str, Tensor]:
        """tokens [B, T] and lengths [B] of these rows."""
        rows = torch.as_tensor(rows)
        return {"tokens": self.tokens[rows], "lengths": self.lengths[rows]}
