"""Text and image encoders, by name or from a local path."""

import os
from pathlib import Path
from typing import Any

from fastxm.encoders.bert import BERT, TextBatch, minilm_directory
from fastxm.encoders.efficientnet import EfficientNetLite0, EfficientNetLite0Layout, read
from fastxm.encoders.inception import InceptionV3
from fastxm.encoders.resnet import ResNet50

__all__ = ["BERT", "EfficientNetLite0", "EfficientNetLite0Layout", "InceptionV3", "ResNet50",
           "TextBatch", "image_encoder", "joint_encoder", "text_encoder"]  # fmt: skip


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
) -> EfficientNetLite0 | InceptionV3 | ResNet50:
    """A frozen image encoder: pooled features, `features` at several scales, `logits`.

    Args:
        source: "efficientnet-lite0", or "efficientnet-lite0-layout", whose features also say where
            things are; or a file of weights, of the first or of torchvision's Inception-v3 or
            ResNet-50.
        options: `image_size`, of the encoder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds another network.
    """
    if source == "efficientnet-lite0":
        return EfficientNetLite0(**options)
    if source == "efficientnet-lite0-layout":
        return EfficientNetLite0Layout(**options)
    if not Path(source).is_file():
        raise FileNotFoundError(f"an image encoder is efficientnet-lite0 or a file, not {source}")
    state = read(source)
    if "Mixed_6e.branch1x1.conv.weight" in state:
        return InceptionV3(state, **options)
    if "layer4.2.conv3.weight" in state:
        return ResNet50(state, **options)
    return EfficientNetLite0(source, **options)


def joint_encoder(directory: str | os.PathLike[str]) -> Any:
    """A frozen encoder of pictures and captions into one space, from a local directory.

    It has `width`, D; `embed_images(images)` and `embed_text(captions)`, [B, D], unit rows; and
    `image_encoder` and `text_encoder`, whose features both take too, and `evidence` of the former.

    Args:
        directory: of a saved `DualEncoder`, or of a CLIP (`fastxm.encoders.clip`).

    Raises:
        FileNotFoundError: there is none, or it has no weights.
        ValueError: it holds another model, or not all of one.
    """
    from fastxm.encoders.clip import CLIP
    from fastxm.encoders.dual import DualEncoder

    config = Path(directory) / "config.json"
    if config.is_file() and f'"{DualEncoder.model_type}"' in config.read_text():
        return DualEncoder.from_pretrained(directory).requires_grad_(False)
    return CLIP(directory)
