"""Pictures before they are read, the origin that reads them, and the cache of what was read."""

import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastxm.data.cache import build_once, cache_root, digest, log, track

FEW = 256  # pictures that are read before another process has started


@dataclass(frozen=True)
class Picture:
    """One picture of a source: where it is, what its captions are, how it is drawn."""

    id: str
    path: Any  # what its source's `read` takes; named by str()
    captions: list[str]
    group: str
    split: str
    weight: float = 1.0
    dropped: bool = False  # in the cache, not in the data set: a filter left it out


@dataclass(frozen=True)
class Source:
    """Pictures of one origin and the function that reads one: read(path, size) -> [S, S, 3]."""

    name: str
    pictures: list[Picture]
    read: Callable[[Any, int], np.ndarray]
    made_of: dict[str, Any] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # before reading: no caption ...


def split_of(name: str) -> str:
    """Every tenth name, by its hash, is in val, the others in train: the same on any machine."""
    whole = hashlib.md5(name.encode("utf-8", "surrogateescape"))  # a name may be in any encoding
    return "val" if int(whole.hexdigest(), 16) % 10 == 0 else "train"


def flatten(image: Image.Image, background: str = "white") -> Image.Image:
    """The picture as RGB of 8 bits, its transparent parts over a colour."""
    if image.mode.startswith("I"):  # greys of 16 bits, which `convert` would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        under = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(under, image)
    return image.convert("RGB")


def rendered(
    source: Source,
    image_size: int,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool = True,
    verify: bool = False,
) -> tuple[np.ndarray, dict[str, Any], Path]:
    """All pictures of a source, of which there is at least one, at one size; read once.

    Returns:
        images: uint8 [N, S, S, 3], a read-only memory map.
        manifest: ids [N], of train before those of val; skipped, pairs of name and reason.
        directory: the cache.
    """
    pictures = sorted(source.pictures, key=lambda picture: (picture.split, picture.id))
    made_of = {
        "format": 1,
        "image_size": image_size,
        "pictures": digest([[p.id, p.split] for p in pictures]),
        **source.made_of,
    }
    directory = cache_root(cache_dir) / f"{source.name}-{image_size}-{digest(made_of)}"
    fill = partial(write_images, source, pictures, image_size, workers, progress)
    manifest = build_once(directory, made_of, fill, verify=verify)
    images = np.load(directory / "images.npy", mmap_mode="r")[: len(manifest["ids"])]
    return images, manifest, directory


def write_images(
    source: Source,
    pictures: list[Picture],
    image_size: int,
    workers: int | None,
    progress: bool,
    directory: Path,
) -> dict[str, Any]:
    shape = (len(pictures), image_size, image_size, 3)
    images = np.lib.format.open_memmap(directory / "images.npy", "w+", np.uint8, shape)
    ids: list[str] = []
    skipped: list[tuple[str, str]] = []
    results = read_all(source, pictures, image_size, workers)
    title = f"{source.name} at {image_size} px"
    for picture, result in track(zip(pictures, results), len(pictures), title, progress=progress):
        if isinstance(result, str):
            log.warning("skipped %s: %s", picture.path, result)
            skipped.append((str(picture.path), result))
        else:
            images[len(ids)] = result
            ids.append(picture.id)
    images.flush()
    return {"ids": ids, "skipped": skipped}


def read_all(
    source: Source, pictures: list[Picture], image_size: int, workers: int | None
) -> Iterator[np.ndarray | str]:
    """The pictures in order; in the place of one that cannot be read, the reason."""
    read = partial(read_one, source.read, image_size)
    yield from in_processes(read, [picture.path for picture in pictures], workers)


def in_processes(
    function: Callable[[Any], Any],
    items: list[Any],
    workers: int | None,
    *,
    few: int | None = None,
    chunk: int = 32,
) -> Iterator[Any]:
    """What a function makes of items, in order.

    Args:
        workers: processes; by default as many as cores, at most 8.
        few: so many items, by default FEW, are left to this process.
        chunk: items that a process takes at a time.
    """
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    if workers <= 1 or len(items) <= (FEW if few is None else few):
        yield from map(function, items)
        return
    # fork where it is the habit: a script without a __main__ guard works
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context, leave_with, (os.getpid(),)) as pool:
        yield from pool.map(function, items, chunksize=chunk)


def leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, killed perhaps: a fork would hold its locks."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_one(
    read: Callable[[Any, int], np.ndarray], image_size: int, path: Any
) -> np.ndarray | str:
    try:
        return read(path, image_size)
    except Exception as error:  # a broken picture raises anything; it is named, never hidden
        return f"{type(error).__name__}: {error}"
