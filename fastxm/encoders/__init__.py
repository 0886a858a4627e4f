"""Text and image encoders, by name or from a local path."""

import os
from typing import Any

from fastxm.encoders.bert import BERT, TextBatch, minilm_directory
from fastxm.encoders.efficientnet import EfficientNetLite0

__all__ = ["BERT", "EfficientNetLite0", "TextBatch", "image_encoder", "text_encoder"]


def text_encoder(source: str | os.PathLike[str] = "minilm", **options: Any) -> BERT:
    """A frozen text encoder: captions in, a `TextBatch` of words, sentence and lengths out.

    Args:
        source: "minilm", a local directory, or the hub name of a BERT.
        options: `max_length`, `sentence`, of `fastxm.encoders.bert.BERT`.
    """
    if source == "minilm":
        return BERT(minilm_directory(), label="minilm", **options)
    return BERT(source, **options)


def image_encoder(
    source: str | os.PathLike[str] = "efficientnet-lite0", **options: Any
) -> EfficientNetLite0:
    """A frozen image encoder: pooled features, `features` at several scales, `logits`.

    Args:
        source: "efficientnet-lite0", or a file of its weights.
        options: `image_size`, of `fastxm.encoders.efficientnet.EfficientNetLite0`.
    """
    weights = None if source == "efficientnet-lite0" else source
    return EfficientNetLite0(weights, **options)
