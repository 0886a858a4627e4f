"""Which pictures of a data set stand for it (rows for `CaptionedImages.select`); captions alone."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fastxm.data.captioned import CaptionedImages


def principal(dataset: "CaptionedImages") -> np.ndarray:
    """Rows of the pictures that are drawn most of their concept: of `emoji`, no skin tones."""
    _, group = np.unique(np.array(dataset.groups), return_inverse=True)
    most = np.zeros(group.max(initial=-1) + 1)
    np.maximum.at(most, group, dataset.weights)
    return np.flatnonzero(dataset.weights == most[group])


def full_weight(dataset: "CaptionedImages") -> np.ndarray:
    """Rows of the pictures that are drawn most of all: of `emoji`, no skin tones and no flags."""
    return np.flatnonzero(dataset.weights == dataset.weights.max(initial=0))


def captions_alone(dataset: "CaptionedImages") -> tuple[list[str], np.ndarray]:
    """The captions of a data set without their pictures, sorted, each once.

    Returns:
        N captions; and weights [N], as often as each is a caption of a picture that is drawn.
    """
    weights: dict[str, list[float]] = {}
    for captions, weight in zip(dataset.captions, dataset.weights):
        for caption in captions:
            weights.setdefault(caption, []).append(weight / len(captions))
    texts = sorted(weights)
    return texts, np.array([sum(sorted(weights[text])) for text in texts])
