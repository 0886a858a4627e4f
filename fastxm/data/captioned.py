"""Captioned pictures in memory, whatever they came from: `open_dataset` and `prepare`."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastxm.data import emoji, folder, shards
from fastxm.data.cache import log
from fastxm.data.features import TextEncoder, text_features
from fastxm.data.pictures import Source, rendered

SPLITS = ("train", "val")


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and their captions.

    Attributes:
        images: uint8 [N, S, S, 3], a memory map where the pictures lie together in the cache.
        captions: the captions of each picture, at least one; a fixed list.
        ids: a name of each picture.
        groups: the concept of each picture: pictures of one group say the same.
        weights: float64 [N], how often each is drawn, relative to the others.
        skipped: files that are not in it, with the reason.
    """

    images: np.ndarray
    captions: list[list[str]]
    ids: list[str]
    groups: list[str]
    weights: np.ndarray
    name: str
    split: str
    cache_dir: Path
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_size(self) -> int:
        return self.images.shape[1]

    def image(self, index: int) -> Tensor:
        """One picture. Returns [3, S, S] in [0, 1]."""
        return self.batch([index])[0]

    def batch(self, indices: Any) -> Tensor:
        """Several pictures. Returns [B, 3, S, S] in [0, 1]."""
        return planes(self.pixels(indices))

    def pixels(self, indices: Any) -> Tensor:
        """Several pictures as they are kept. Returns uint8 [B, S, S, 3]."""
        return torch.from_numpy(np.ascontiguousarray(self.images[np.asarray(indices)]))

    def select(self, indices: Any) -> "CaptionedImages":
        """The data set of these pictures, in this order."""
        rows = np.asarray(indices, dtype=np.int64)
        together = len(rows) > 0 and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
        return replace(
            self,
            images=self.images[rows[0] : rows[-1] + 1] if together else self.images[rows],
            captions=[self.captions[i] for i in rows],
            ids=[self.ids[i] for i in rows],
            groups=[self.groups[i] for i in rows],
            weights=self.weights[rows],
        )


def resizing(name_or_path: str | os.PathLike[str], resize: str) -> dict[str, Any]:
    """Options of `open_dataset` of how pictures are made square, which those of `emoji` are."""
    return {} if name_or_path == "emoji" else {"resize": resize}


def planes(pixels: Tensor) -> Tensor:
    """Bytes [B, S, S, 3] as floats [B, 3, S, S] in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(255)


def open_dataset(
    name_or_path: str | os.PathLike[str],
    image_size: int = 64,
    split: str = "train",
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    verify: bool = False,
    **options: Any,
) -> CaptionedImages:
    """Opens captioned pictures; the first time they are read into the cache.

    Args:
        name_or_path: "emoji", a folder of pictures with captions (`fastxm.data.folder`), or tars: a
            folder of them, one, or a pattern "SHARDS/{00000..00099}.tar" (`fastxm.data.shards`).
        image_size: the side S of the pictures.
        split: "train" or "val".
        cache_dir: where to keep them; $FASTXM_DATA or ~/.cache/fastxm if not given.
        workers: processes that read pictures; by default as many as cores, at most 8.
        progress: show a progress bar while reading.
        verify: compare the cache with its hashes, and make it again if it differs.
        **options: of `fastxm.data.emoji.source`; of a folder and shards `resize`, `uncaptioned`.

    Raises:
        ModuleNotFoundError: a package that holds the pictures is missing.
        FileNotFoundError: there is no such folder or tar.
        ValueError: fewer than 2 captioned pictures, an unknown split or option.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {SPLITS}, not {split!r}")
    if image_size < 1:
        raise ValueError(f"image_size is at least 1, not {image_size}")
    reading: dict[str, Any] = {"cache_dir": cache_dir, "workers": workers, "progress": progress}
    source = open_source(name_or_path, options, reading)
    if not source.pictures:
        raise ValueError(too_few(name_or_path, 0, source.skipped))
    images, manifest, directory = rendered(source, image_size, verify=verify, **reading)
    skipped = source.skipped + [(path, reason) for path, reason in manifest["skipped"]]
    if skipped:
        log.warning("%s: %d pictures read, %d skipped", source.name, len(images), len(skipped))
    by_id = {picture.id: picture for picture in source.pictures}
    pictures = [by_id[id] for id in manifest["ids"]]
    whole = CaptionedImages(
        images=images,
        captions=[picture.captions for picture in pictures],
        ids=manifest["ids"],
        groups=[picture.group for picture in pictures],
        weights=np.array([picture.weight for picture in pictures], np.float64),
        name=source.name,
        split=split,
        cache_dir=directory,
        skipped=skipped,
    )
    rows = [i for i, p in enumerate(pictures) if p.split == split and not p.dropped]
    if len(whole) < 2:
        raise ValueError(too_few(name_or_path, len(whole), skipped))
    if split == "train" and len(rows) < 2:
        raise ValueError(too_few(f"{name_or_path}, split train", len(rows), skipped))
    return whole.select(rows)


def open_source(
    name_or_path: str | os.PathLike[str], options: dict[str, Any], reading: dict[str, Any]
) -> Source:
    if name_or_path == "emoji":
        return emoji.source(**options)
    path = Path(name_or_path).expanduser()
    if shards.is_shards(path):
        return shards.source(path, **options, **reading)
    if not path.is_dir():
        raise FileNotFoundError(
            f"a data set is 'emoji' or a folder of pictures, or of tars, not {path}"
        )
    return folder.source(path, **options)


def too_few(name: str | os.PathLike[str], found: int, skipped: list[tuple[str, str]]) -> str:
    message = f"a data set needs at least 2 captioned pictures to train on, found {found} in {name}"
    if not skipped:
        return message
    shown = ", ".join(f"{Path(path).name} ({reason})" for path, reason in skipped[:3])
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"{message}; skipped {len(skipped)}: {shown}{more}"


def prepare(
    name_or_path: str | os.PathLike[str],
    image_size: int = 64,
    encoder: TextEncoder | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, CaptionedImages]:
    """Reads all pictures and encodes all captions into the cache, and checks what is there already.

    Args:
        encoder: of the captions; None leaves them out.
        name_or_path, image_size, cache_dir, **options: as in `open_dataset`.

    Returns:
        The data set of each split.
    """
    splits = {
        split: open_dataset(
            name_or_path, image_size, split, cache_dir, verify=split == SPLITS[0], **options
        )
        for split in SPLITS
    }
    if encoder is not None:
        for dataset in splits.values():
            if len(dataset):
                text_features(dataset, encoder, verify=True)
    return splits
