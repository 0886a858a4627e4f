"""How well texts are written: BLEU of texts against references, perplexity of given texts."""

import math
from collections import Counter
from collections.abc import Sequence, Set

from torch import Tensor

Words = Sequence[str]


def bleu(texts: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 4) -> float:
    """Corpus BLEU with every order from 1 to `order` of equal weight, without smoothing.

    Args:
        texts: N texts, each a list of words.
        references: for each text one or more right ones.
        order: the longest run of words that is counted.

    Returns:
        a number in [0, 1]; 0 where no run of some order is right.

    Raises:
        ValueError: not one set of references a text, or one that is empty.

    Source: Papineni et al. 2002, BLEU.
    """
    if len(texts) != len(references) or not all(references) or not texts:
        raise ValueError(
            f"bleu needs one or more references of each text, not {len(texts)} texts and "
            f"{len(references)} sets of references"
        )
    right, total = [0] * order, [0] * order
    written = wanted = 0
    for text, right_ones in zip(texts, references):
        written += len(text)
        # of the references' lengths the nearest, of two as near the shorter
        wanted += min((len(r) for r in right_ones), key=lambda n: (abs(n - len(text)), n))
        for n in range(1, order + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in right_ones:
                most |= runs(reference, n)
            found = runs(text, n)
            right[n - 1] += sum((found & most).values())
            total[n - 1] += sum(found.values())
    if not all(right):
        return 0.0
    precision = sum(math.log(r / t) for r, t in zip(right, total)) / order
    return math.exp(precision + min(0.0, 1 - wanted / written))


def runs(words: Words, n: int) -> Counter[tuple[str, ...]]:
    """The runs of n words in a text, counted."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def shared_words(
    texts: Sequence[Words], references: Sequence[Sequence[Words]], ignore: Set[str]
) -> float:
    """The share of the words written, each once a text, that some reference of the text has.

    Args:
        texts: N texts, each a list of words.
        references: for each text one or more right ones.
        ignore: words that say nothing, which are not counted.

    Returns:
        a number in [0, 1]; 0 where nothing is left to count.
    """
    right = total = 0
    for text, right_ones in zip(texts, references):
        told = set(text) - ignore
        right += len(told & {word for reference in right_ones for word in reference})
        total += len(told)
    return right / total if total else 0.0


def common_words(captions: Sequence[Words], share: float = 0.05) -> set[str]:
    """The words that more than this share of captions hold."""
    counts = Counter(word for caption in captions for word in set(caption))
    return {word for word, count in counts.items() if count > share * len(captions)}


def perplexity(nll: Tensor, lengths: Tensor) -> float:
    """exp of the mean surprise over all words and ends.

    Args:
        nll: [B, T + 1] in nats, 0 after the end.
        lengths: [B], words of each text without its end.
    """
    return math.exp(nll.double().sum().item() / (lengths + 1).sum().item())
