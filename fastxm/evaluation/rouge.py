"""ROUGE-L: how much of a text comes in another in the same order (Lin 2004)."""

from collections.abc import Sequence

Words = Sequence[str]


def rouge_l(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """The mean over texts of their best F1 against any of their references.

    Args:
        texts: N texts, each a list of words.
        references: for each text one or more right ones.

    Returns:
        a number in [0, 1].

    Raises:
        ValueError: not one set of references a text, or one that is empty.
    """
    if len(texts) != len(references) or not all(references) or not texts:
        raise ValueError(
            f"rouge_l needs one or more references of each text, not {len(texts)} texts and "
            f"{len(references)} sets of references"
        )
    best = [max(f1(text, r) for r in right_ones) for text, right_ones in zip(texts, references)]
    return sum(best) / len(best)


def f1(text: Words, reference: Words) -> float:
    """Harmonic mean of the shares of both texts that their longest common subsequence is."""
    common = longest_common(text, reference)
    return 2 * common / (len(text) + len(reference)) if common else 0.0


def longest_common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]
