"""A split for learning without captions: who learns from which pictures, so that none leaks.

A joint encoder has learnt from pairs of pictures and captions. A generator that is then trained
"without captions" would still have been told them if the pairs held its pictures' captions. So

    encoder      pairs of the first style
    generator    pictures of the second style, without their captions
    held out     pictures and captions of the second style, of concepts that neither saw

`emoji` has the styles openmoji and twemoji, which its captions name, so that none is shared. The
training concepts are then either shared, as CLIP knows what any picture shows, or parted too, one
half to the encoder and the other to the generator. A folder, or tars, have one style; their
concepts part.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastxm.data.captioned import CaptionedImages, open_dataset

STYLES = {"encoder": "openmoji", "generator": "twemoji"}


@dataclass(frozen=True)
class LeakFree:
    """What the encoder learns from, what the generator does, and what neither sees."""

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
        captions = len(told(self.encoder) & (told(self.generator) | told(self.held_out)))
        groups = [set(part.groups) for part in (self.encoder, self.generator, self.held_out)]
        return [
            *rows,
            f"of the encoder's: {captions} captions and {len(groups[0] & groups[1])} concepts "
            f"are among the generator's, {len(groups[0] & groups[2])} concepts are held out",
        ]


def leak_free(data: str, image_size: int, *, parted: bool = False, **options: Any) -> LeakFree:
    """Splits a captioned data set between a joint encoder and a generator.

    Args:
        data: "emoji", a folder or tar shards.
        image_size: side of the pictures.
        parted: part the training concepts too, as a folder's always are.
        **options: of `open_dataset`.

    Raises:
        ValueError: a part would hold fewer than 2 pictures.
    """
    parts: dict[str, CaptionedImages] = {}
    for name, style in STYLES.items():
        more = {**options, "styles": (style,)} if data == "emoji" else options
        for split in ("train", "val"):
            parts[f"{name} {split}"] = open_dataset(data, image_size, split, **more)
    encoder, generator = parts["encoder train"], parts["generator train"]
    if parted or data != "emoji":
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
