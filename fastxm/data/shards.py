"""Tar shards, as WebDataset and img2dataset write them.

    SHARDS/00000.tar    a.jpg, a.txt, a.json, b.jpg, ...
    KEY.jpg             a picture (or png, jpeg, webp); KEY is the name up to its first dot
    KEY.txt             its captions, one a line; without it, KEY.json's caption, captions, ...

A data set is a folder of tars, a tar, or a pattern, "SHARDS/{00000..00331}.tar". If all tars lie in
folders named `train` and `val`, these are the splits; else every tenth key, by its hash, is in val.
A key is a tar's own: the same key in two tars is two pictures, of the same split.

The headers of each tar are read once, into an index in the cache; its pictures are then read where
they lie, in any order. So shards are all that a folder is: draws go over the whole set, a run is
resumed exactly, and features are kept by row. A stream of shards, as the package webdataset reads
them, draws from a buffer of some neighbours, which no checkpoint holds. Nothing is ever extracted:
the names in a tar are names, not paths.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastxm.data import folder
from fastxm.data.cache import build_once, cache_root, digest, log, manifest_of, track
from fastxm.data.pictures import Picture, Source, in_processes, split_of

PICTURES = tuple(suffix.removeprefix(".") for suffix in folder.SUFFIXES)
TEXTS = ("txt", "json")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Member(NamedTuple):
    """Where a picture lies."""

    tar: str
    name: str
    offset: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


def is_shards(path: Path) -> bool:
    """Whether a path is a tar, a pattern of tars, or a folder that holds tars and no pictures."""
    if not path.is_dir():
        return path.suffix == ".tar" or bool(BRACES.search(str(path)))
    found = False
    for file in path.rglob("*"):
        if file.suffix.lower() in folder.SUFFIXES or file.name in folder.TABLES:
            return False
        found = found or file.suffix == ".tar"
    return found


def source(
    path: Path,
    *,
    resize: str = "crop",
    uncaptioned: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Source:
    """The captioned pictures of shards.

    A tar that is cut short or damaged gives what is whole before that place; it is named in the
    log. Keys without a picture or a caption that can be read are skipped.

    Args:
        path: a folder of tars, a tar, or a pattern of tars.
        resize, uncaptioned: as in `fastxm.data.folder.source`.
        cache_dir: where the indices are kept, as in `open_dataset`.
        workers: processes that read headers; by default as many as cores, at most 8.
        progress: show a progress bar while reading them.

    Raises:
        ValueError: an unknown way to resize, or braces that are neither a range nor a list.
        FileNotFoundError: a tar is missing.
    """
    folder.check_resize(resize)
    tars = tars_of(path)
    home = Path(os.path.commonpath([tar.parent for tar in tars]))
    split_already = {tar.parent.name for tar in tars} == {"train", "val"}
    stamps = [[(stat := tar.stat()).st_size, stat.st_mtime_ns] for tar in tars]
    pictures: list[Picture] = []
    skipped: list[tuple[str, str]] = []
    for tar, index in zip(tars, indices(tars, stamps, cache_root(cache_dir), workers, progress)):
        if index["damage"]:
            log.warning("%s: %s", tar, index["damage"])
            skipped.append((str(tar), index["damage"]))
        skipped += [(f"{tar}:{name}", reason) for name, reason in index["skipped"]]
        shard = os.path.relpath(tar, home)
        for name, offset, size, captions in index["pictures"]:
            place = Member(str(tar), name, offset, size)
            if not captions and not uncaptioned:
                skipped.append((str(place), "no caption"))
                continue
            id = f"{shard}:{name}"
            split = tar.parent.name if split_already else split_of(parts_of(name)[1])
            pictures.append(Picture(id, place, captions, id, split))
    names = [os.path.relpath(tar, home) for tar in tars]
    made_of = {"resize": resize, "path": str(home), "shards": digest([names, stamps])}
    return Source(home.name, pictures, partial(read, resize=resize), made_of, skipped)


def tars_of(path: Path) -> list[Path]:
    """The tars of a folder, at any depth, or those that a pattern names, each once."""
    if path.is_dir():
        return sorted(path.absolute().rglob("*.tar"))
    tars = [path] if path.exists() else [Path(name) for name in expand(str(path))]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} stands for {len(tars)} tars, {len(missing)} of them missing: {missing[0]} ..."
        )
    return list(dict.fromkeys(Path(os.path.abspath(tar)) for tar in tars))


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for: {08..11} counts and {a,b} lists, as in a shell."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    values = found[1].split(",") if "," in found[1] else []
    if ends := RANGE.fullmatch(found[1]):
        first, last = ends.groups()
        values = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    if not values:
        raise ValueError(f"{found[0]} in {pattern} is no range {{00..99}} and no list {{a,b}}")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for value in values for name in expand(f"{before}{value}{after}")]


def indices(
    tars: list[Path], stamps: list[list[int]], root: Path, workers: int | None, progress: bool
) -> list[dict[str, Any]]:
    """What each tar holds; read from the headers of those that are new or have changed."""
    wanted = [
        (
            root / "shards" / f"{tar.stem}-{digest(str(tar))}",
            {"format": 1, "tar": str(tar), "stamp": stamp},
        )
        for tar, stamp in zip(tars, stamps)
    ]
    found = [manifest_of(directory, made_of) for directory, made_of in wanted]
    new = [i for i, manifest in enumerate(found) if manifest is None]
    if new:
        made = in_processes(index, [wanted[i] for i in new], workers, few=4, chunk=1)
        made = track(made, len(new), "headers of shards", progress=progress)
        for manifest, i in zip(made, new):
            found[i] = manifest
    return found  # type: ignore[return-value]


def index(wanted: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """The index of one tar, made where it is not in the cache.

    Returns:
        pictures: name, offset, size and captions of each; skipped: pairs of name and reason;
        damage: why the tar is not whole, or "".
    """
    directory, made_of = wanted
    return build_once(directory, made_of, lambda _: contents(Path(made_of["tar"])))


def contents(tar: Path) -> dict[str, Any]:
    pictures: dict[str, tuple[str, int, int]] = {}
    texts: dict[str, dict[str, tuple[str, bytes]]] = {}
    skipped: list[tuple[str, str]] = []
    damage, count = "", 0
    try:
        for member, text in members(tar):
            count += 1
            key, _, kind = parts_of(member.name)
            if text is not None:
                texts.setdefault(key, {})[kind] = (member.name, text)
            elif key in pictures:
                skipped.append((member.name, "a second picture of its key"))
            else:
                pictures[key] = (member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        damage = f"no whole tar, after {count} of its pictures and texts: {error}"
    found: list[tuple[str, int, int, list[str]]] = []
    for key, place in pictures.items():
        captions = captions_of(texts.pop(key, {}))
        if isinstance(captions, str):
            skipped.append((place[0], captions))
        else:
            found.append((*place, captions))
    skipped += [(name, "no picture") for kinds in texts.values() for name, _ in kinds.values()]
    return {"pictures": found, "skipped": skipped, "damage": damage}


def members(tar: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The pictures, and the texts with their bytes, of a tar, in order.

    Raises:
        tarfile.TarError: at the place from which the tar is not whole.
    """
    length = tar.stat().st_size
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            if member.offset_data + member.size > length:
                raise tarfile.ReadError(f"{member.name} is cut off")
            _, stem, kind = parts_of(member.name)
            if not stem or not member.isreg() or member.issparse():
                continue
            if kind in PICTURES:
                yield member, None
            elif kind in TEXTS and (file := archive.extractfile(member)):
                yield member, file.read()
        with tar.open("rb") as file:  # which tarfile takes for the end, whatever is there
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {archive.offset}")


def parts_of(name: str) -> tuple[str, str, str]:
    """A member's key, the key without its folders, and the kind of the member."""
    directory, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{directory}{slash}{stem}", stem, kind.lower()


def captions_of(texts: dict[str, tuple[str, bytes]]) -> list[str] | str:
    """The captions of a key, of its .txt, else of its .json; or why they cannot be read."""
    for kind in TEXTS:
        if kind not in texts:
            continue
        name, text = texts[kind]
        try:
            if kind == "txt":
                return folder.tidy(text.decode("utf-8").splitlines())
            row = json.loads(text)
        except ValueError as error:  # not UTF-8, or not JSON
            return f"{name}: {error}"
        if isinstance(row, dict) and not row.keys().isdisjoint(folder.COLUMNS):
            return folder.tidy(folder.captions_of(row, Path(name)))
    return []


def read(place: Member, size: int, *, resize: str) -> np.ndarray:
    """One picture. Returns uint8 [size, size, 3]."""
    with open(place.tar, "rb") as file:
        file.seek(place.offset)
        return folder.read(io.BytesIO(file.read(place.bytes)), size, resize=resize)
