"""Text and image encoders, by name or from a local path."""

import os
from typing import Any

from fastxm.encoders.bert import BERT, TextBatch, minilm_directory
from fastxm.encoders.efficientnet import EfficientNetLite0, EfficientNetLite0Layout
from fastxm.encoders.resnet import ResNet50

__all__ = ["BERT", "EfficientNetLite0", "EfficientNetLite0Layout", "ResNet50", "TextBatch",
           "image_encoder", "text_encoder"]  # fmt: skip


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
) -> EfficientNetLite0 | ResNet50:
    """A frozen image encoder: `embed` gives features of pictures, `width` wide.

    Args:
        source: "efficientnet-lite0"; "efficientnet-lite0-layout", whose features also say where
            things are; "resnet50:FILE", of torchvision's weights; or a file of EfficientNet-Lite0's
            weights.
        options: `image_size`, of these classes.
    """
    if source == "efficientnet-lite0-layout":
        return EfficientNetLite0Layout(**options)
    if str(source).startswith("resnet50:"):
        return ResNet50(str(source).removeprefix("resnet50:"), **options)
    weights = None if source == "efficientnet-lite0" else source
    return EfficientNetLite0(weights, **options)
