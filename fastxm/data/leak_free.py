"""A split for learning without captions: who learns from which pictures, so that none leaks.

A joint encoder has learnt from pairs of pictures and captions. A generator that is then trained
"without captions" would still have been told them if the pairs held its pictures' captions. So

    encoder      pairs of the first style and of one half of the training concepts
    generator    pictures of the second style and of the other half, without their captions
    held out     pictures and captions of the second style and of concepts that neither saw

`emoji` has the styles openmoji and twemoji; a folder has one style, and its concepts part alone.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastxm.data.captioned import CaptionedImages, open_dataset

STYLES = {"encoder": "openmoji", "generator": "twemoji"}


@dataclass(frozen=True)
class LeakFree:
    """Three data sets, none of which shares a picture, a concept or a caption with another."""

    encoder: CaptionedImages
    encoder_held_out: CaptionedImages
    generator: CaptionedImages
    held_out: CaptionedImages

    def lines(self) -> list[str]:
        """What the split is, to print."""
        parts = {
            "encoder": (self.encoder, "pairs"),
            "generator": (self.generator, "pictures, captions unseen"),
            "held out": (self.held_out, "pictures"),
        }
        rows = [f"{name}: {len(part)} {what} of {len(set(part.groups))} concepts{styles(part)}"
                for name, (part, what) in parts.items()]  # fmt: skip
        shared = len(told(self.encoder) & (told(self.generator) | told(self.held_out)))
        return [*rows, f"captions of the encoder's pairs among the generator's: {shared}"]


def leak_free(
    data: str, image_size: int, *, shared_concepts: bool = False, **options: Any
) -> LeakFree:
    """Splits a captioned data set between a joint encoder and a generator.

    Args:
        data: "emoji", or a folder.
        image_size: side of the pictures.
        shared_concepts: the encoder may learn of all training concepts: in another style, of
            `emoji` no caption is shared even so, for each names its style.
        **options: of `open_dataset`.

    Raises:
        ValueError: a part would hold fewer than 2 pictures.
    """
    parts: dict[str, CaptionedImages] = {}
    for name, style in STYLES.items():
        styled = {"styles": (style,)} if data == "emoji" else {}
        for split in ("train", "val"):
            parts[f"{name} {split}"] = open_dataset(data, image_size, split, **styled, **options)
    encoder, generator = parts["encoder train"], parts["generator train"]
    if not shared_concepts or data != "emoji":
        encoder = encoder.select(rows_of_half(encoder, 0))
        generator = generator.select(rows_of_half(generator, 1))
    for name, part in (("encoder", encoder), ("generator", generator)):
        if len(part) < 2:
            raise ValueError(f"{data} leaves the {name} {len(part)} pictures, of which it needs 2")
    return LeakFree(encoder, parts["encoder val"], generator, parts["generator val"])


def rows_of_half(dataset: CaptionedImages, half: int) -> np.ndarray:
    """Rows of the pictures of one half of the concepts, by a hash: the same on any machine."""
    digests = [hashlib.sha256(group.encode()).digest()[0] % 2 for group in dataset.groups]
    return np.flatnonzero(np.array(digests) == half)


def styles(dataset: CaptionedImages) -> str:
    found = sorted({id.rpartition("/")[0] for id in dataset.ids} - {""})
    return f" ({', '.join(found)})" if dataset.name == "emoji" and found else ""


def told(dataset: CaptionedImages) -> set[str]:
    """The captions of a data set."""
    return {caption for captions in dataset.captions for caption in captions}
