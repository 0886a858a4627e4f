"""Text and image encoders, by name or from a local path."""

import os
from typing import Any

from fastxm.encoders.bert import BERT, TextBatch, minilm_directory

__all__ = ["BERT", "TextBatch", "text_encoder"]


def text_encoder(source: str | os.PathLike[str] = "minilm", **options: Any) -> BERT:
    """A frozen text encoder: captions in, a `TextBatch` of words, sentence and lengths out.

    Args:
        source: "minilm", a local directory, or the hub name of a BERT.
        options: `max_length`, `sentence`, of `fastxm.encoders.bert.BERT`.
    """
    if source == "minilm":
        return BERT(minilm_directory(), label="minilm", **options)
    return BERT(source, **options)
