"""Text features of a data set, computed once: `text_features` and the memory map that it opens.

A caption that several pictures share is encoded once. Words lie one after the other without
padding, in float16; a batch is padded with zeros to the encoder's length.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastxm.data.cache import build_once, digest, track

if TYPE_CHECKING:
    from fastxm.data.captioned import CaptionedImages

CHUNK = 128  # captions encoded at a time


class TextEncoder(Protocol):
    """What encodes captions: texts -> words [B, T, E], sentence [B, E], lengths [B]."""

    name: str
    width: int
    max_length: int

    def __call__(self, captions: Sequence[str], /) -> Any: ...


class TextFeatures:
    """Features of every caption of a data set.

    Args:
        directory: a cache that `text_features` made.
        rows: int64 [sum of captions], the row of each caption of each picture, in order.
        starts: int64 [N + 1], where the captions of each picture start in rows.
        max_length: T, to which a batch is padded.
    """

    def __init__(self, directory: Path, rows: np.ndarray, starts: np.ndarray, max_length: int):
        self.rows, self.starts, self.max_length = rows, starts, max_length
        self.words = np.load(directory / "words.npy", mmap_mode="r")  # [sum of lengths, E]
        self.sentences = np.load(directory / "sentences.npy")  # [U, E]
        self.lengths = np.load(directory / "lengths.npy")  # [U]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.width = self.sentences.shape[1]

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, image: Any, caption: Any) -> Any:
        """The row of caption number `caption` of a picture; both numbers or integer arrays."""
        image, caption = np.asarray(image), np.asarray(caption)
        counts = self.starts[image + 1] - self.starts[image]
        if (caption < 0).any() or (caption >= counts).any():
            raise IndexError("a caption number beyond the picture's captions")
        rows = self.rows[self.starts[image] + caption]
        return int(rows) if rows.ndim == 0 else rows

    def batch(self, rows: Any) -> dict[str, Tensor]:
        """Features of these rows.

        Returns:
            words [B, T, E] and sentence [B, E] in float32, lengths [B] in int64; words beyond
            a caption's length are zero.
        """
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        slots = np.arange(self.max_length)
        real = slots < lengths[:, None]  # [B, T]
        words = np.zeros((*real.shape, self.width), np.float32)
        words[real] = self.words[(self.offsets[rows, None] + slots)[real]]
        return {
            "words": torch.from_numpy(words),
            "sentence": torch.from_numpy(self.sentences[rows].astype(np.float32)),
            "lengths": torch.from_numpy(lengths),
        }


def text_features(
    dataset: "CaptionedImages",
    encoder: TextEncoder,
    *,
    progress: bool = True,
    verify: bool = False,
) -> TextFeatures:
    """Features of the captions of a data set; encoded the first time, then read from the cache.

    Args:
        dataset: its cache directory's parent keeps the features.
        encoder: called with lists of captions; its name, width and max_length name the cache.
        progress: show a progress bar while encoding.
        verify: compare the cache with its hashes, and make it again if it differs.
    """
    flat = [caption for captions in dataset.captions for caption in captions]
    texts = sorted(set(flat), key=lambda text: (len(text), text))
    made_of = {
        "format": 1,
        "encoder": encoder.name,
        "width": encoder.width,
        "max_length": encoder.max_length,
        "captions": digest(texts),
    }
    name = f"{dataset.name}-{dataset.split}-{Path(encoder.name).name}-{digest(made_of)}"
    directory = dataset.cache_dir.parent / name
    fill = partial(write_features, texts, encoder, f"{dataset.split} captions", progress)
    build_once(directory, made_of, fill, verify=verify)
    number = {text: row for row, text in enumerate(texts)}
    rows = np.array([number[text] for text in flat], np.int64)
    starts = np.cumsum([0, *map(len, dataset.captions)])
    return TextFeatures(directory, rows, starts, encoder.max_length)


def write_features(
    texts: Sequence[str], encoder: TextEncoder, title: str, progress: bool, directory: Path
) -> dict[str, Any]:
    # short captions first: chunks of like lengths waste little on padding
    sentences = np.zeros((len(texts), encoder.width), np.float16)
    lengths = np.zeros(len(texts), np.int64)
    raw = directory / "words.raw"
    with raw.open("wb") as file, torch.inference_mode():
        chunks = range(0, len(texts), CHUNK)
        for start in track(chunks, len(texts), title, step=CHUNK, progress=progress):
            encoded = encoder(texts[start : start + CHUNK])
            words, n = encoded.words.cpu(), encoded.lengths.cpu()
            real = torch.arange(words.shape[1]) < n[:, None]
            file.write(words[real].half().numpy().tobytes())
            sentences[start : start + CHUNK] = encoded.sentence.cpu().half().numpy()
            lengths[start : start + CHUNK] = n.numpy()
    np.save(directory / "sentences.npy", sentences)
    np.save(directory / "lengths.npy", lengths)
    shape = (int(lengths.sum()), encoder.width)
    np.save(directory / "words.npy", np.memmap(raw, np.float16, "r", shape=shape))
    raw.unlink()
    return {"captions": len(texts), "words": shape[0]}
