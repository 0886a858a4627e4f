"""Image features of a data set, computed once: `image_features`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastxm.data.cache import build_once, digest, track

if TYPE_CHECKING:
    from fastxm.data.captioned import CaptionedImages

CHUNK = 256  # pictures read at a time; the encoder splits them as its device likes


class ImageEncoder(Protocol):
    """What encodes pictures: images [B, 3, H, W] in [0, 1] -> features [B, width]."""

    name: str
    width: int

    def embed(self, images: Tensor, /) -> Tensor: ...


def image_features(
    dataset: "CaptionedImages", encoder: ImageEncoder, *, progress: bool = True
) -> Tensor:
    """Features of every picture of a data set; computed the first time, then read from the cache.

    Args:
        dataset: its cache directory's parent keeps the features.
        encoder: its name tells its features from any other's.
        progress: show a progress bar while encoding.

    Returns:
        [N, width], float32.
    """
    made_of = {
        "format": 1,
        "encoder": encoder.name,
        "pictures": dataset.cache_dir.name,
        "ids": digest(dataset.ids),
    }
    name = f"{dataset.name}-{dataset.split}-{encoder.name}-{digest(made_of)}"
    directory = dataset.cache_dir.parent / name
    build_once(directory, made_of, partial(write_features, dataset, encoder, progress))
    return torch.from_numpy(np.load(directory / "features.npy"))


def write_features(
    dataset: "CaptionedImages", encoder: ImageEncoder, progress: bool, directory: Path
) -> dict[str, Any]:
    features = np.zeros((len(dataset), encoder.width), np.float32)
    title = f"{dataset.split} pictures"
    starts = range(0, len(dataset), CHUNK)
    for start in track(starts, len(dataset), title, step=CHUNK, progress=progress):
        rows = np.arange(start, min(start + CHUNK, len(dataset)))
        features[rows] = encoder.embed(dataset.batch(rows)).cpu().numpy()
    np.save(directory / "features.npy", features)
    return {"shape": list(features.shape)}
