"""An image folder: captions in metadata.jsonl, metadata.csv or .txt files beside the pictures.

    FOLDER/metadata.jsonl    {"file_name": "a.png", "text": "a red apple"}; `captions` may be a list
    FOLDER/metadata.csv      a header with file_name and caption | text | ...
    FOLDER/a.png, a.txt      one caption a line

Subfolders `train` and `val`, each with files like these, are the splits; without both of them every
tenth picture, by the hash of its name, is in val. Pictures are resized by an antialiased bilinear
filter, transparent ones over white.
"""

import contextlib
import csv
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from fastxm.data.cache import digest
from fastxm.data.pictures import Picture, Source, flatten, split_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("captions", "caption", "text", "TEXT", "txt", "prompt", "sentences_raw")
RESIZES = ("crop", "stretch")


def source(path: Path, *, resize: str = "crop", uncaptioned: bool = False) -> Source:
    """The captioned pictures of a folder.

    Args:
        path: the folder.
        uncaptioned: take pictures without captions too; they then have none.
        resize: "crop" keeps the proportions and cuts the middle square; "stretch" keeps all of
            the picture, as XMC-GAN does.

    Raises:
        ValueError: an unknown way to resize, metadata that names no pictures or captions, or text
            that is not UTF-8.
    """
    check_resize(resize)
    pictures: list[Picture] = []
    skipped: list[tuple[str, str]] = []
    parts = [(path / "train", "train"), (path / "val", "val")]
    split_already = all(part.is_dir() for part, _ in parts)
    for root, split in parts if split_already else [(path, None)]:
        for file, captions in captioned_files(root):
            captions = tidy(captions)
            if not file.is_file():
                skipped.append((str(file), "no such file"))
            elif not captions and not uncaptioned:
                skipped.append((str(file), "no caption"))
            else:
                name = os.path.relpath(file, path)
                pictures.append(
                    Picture(name, str(file), captions, name, split or split_of(file.stem))
                )
    stamps = [[p.id, (stat := Path(p.path).stat()).st_size, stat.st_mtime_ns] for p in pictures]
    made_of = {"resize": resize, "path": str(path.resolve()), "stamps": digest(sorted(stamps))}
    return Source(path.resolve().name, pictures, partial(read, resize=resize), made_of, skipped)


def check_resize(resize: str) -> None:
    """Raises ValueError where a picture cannot be made square so."""
    if resize not in RESIZES:
        raise ValueError(f"resize is one of {RESIZES}, not {resize!r}")


def tidy(captions: list[str]) -> list[str]:
    """Captions with single spaces, without those that are empty."""
    return [tidied for caption in captions if (tidied := " ".join(caption.split()))]


def captioned_files(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """The pictures under a folder and their captions, as its metadata or the .txt files say."""
    found: dict[Path, list[str]] = {}
    tables = sorted(table for name in TABLES for table in root.rglob(name))
    for table in tables:
        for line in rows_of(table):
            if not line.get("file_name"):
                raise ValueError(f"{table} has a row without file_name")
            found.setdefault(table.parent / str(line["file_name"]), []).extend(
                captions_of(line, table)
            )
    if not tables:
        for file in sorted(root.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                text = file.with_suffix(".txt")
                with utf8(text):
                    found[file] = text.read_text("utf-8").splitlines() if text.is_file() else []
    yield from found.items()


def rows_of(table: Path) -> Iterator[dict[str, Any]]:
    with utf8(table), table.open(encoding="utf-8-sig", newline="") as file:
        if table.suffix == ".csv":
            rows = csv.DictReader(file)
            try:
                yield from rows
            except csv.Error as error:
                where = f"{table}:{rows.line_num}"
                raise ValueError(f"{where} is not CSV: {error}; is a quote open?") from error
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{table}:{number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{table}:{number} is not an object: {line.strip()[:80]}")
                yield row


@contextlib.contextmanager
def utf8(file: Path) -> Iterator[None]:
    """Names the file that is not in UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error


def captions_of(row: dict[str, Any], table: Path) -> list[str]:
    for column in COLUMNS:
        if column in row:
            value = row[column]
            values = value if isinstance(value, list) else [value]
            return [str(item) for item in values if item is not None]
    raise ValueError(f"{table} has a row without a caption; looked for the columns {COLUMNS}")


def read(file: str | BinaryIO, size: int, *, resize: str) -> np.ndarray:
    """One picture. Returns uint8 [size, size, 3]."""
    with Image.open(file) as image:
        picture = flatten(ImageOps.exif_transpose(image))
    box = None
    if resize == "crop":
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
