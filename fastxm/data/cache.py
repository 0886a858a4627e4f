"""What is computed once: a directory that appears whole, with a manifest of its origin."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("fastxm")


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory of all caches: the argument, else $FASTXM_DATA, else ~/.cache/fastxm."""
    chosen = cache_dir or os.environ.get("FASTXM_DATA") or Path.home() / ".cache" / "fastxm"
    return Path(chosen).expanduser().resolve()


def digest(value: Any) -> str:
    """A short name for a JSON value: equal values, equal names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        whole = hashlib.sha256()
        while block := file.read(1 << 22):
            whole.update(block)
    return whole.hexdigest()


def manifest_of(directory: Path, made_of: dict[str, Any], *, verify: bool = False) -> dict | None:
    """The manifest of a whole cache made of just this, or None.

    Args:
        directory: the cache.
        made_of: what it has to have been made from; any difference makes it another cache.
        verify: read the files too and compare their hashes, not only their sizes.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        if manifest["made_of"] != made_of:
            return None
        for name, file in manifest["files"].items():
            if (directory / name).stat().st_size != file["bytes"]:
                return None
            if verify and file_digest(directory / name) != file["sha256"]:
                return None
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    return manifest


def build_once(
    directory: Path,
    made_of: dict[str, Any],
    fill: Callable[[Path], dict[str, Any]],
    *,
    verify: bool = False,
) -> dict[str, Any]:
    """Fills a cache directory unless it is there, and returns its manifest.

    The files are written under another name, which takes the directory's place when all is there:
    a run that is stopped leaves nothing that could be taken for a cache. Of several processes
    that ask at once, one works and the others wait.

    Args:
        directory: where the cache is to be.
        made_of: what it is made from, as JSON.
        fill: writes the files into the path that it gets; what it returns joins the manifest.
        verify: check the hashes of files that are there already.
    """
    found = manifest_of(directory, made_of, verify=verify)
    if found is not None:
        return found
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        found = manifest_of(directory, made_of, verify=verify)
        if found is not None:
            return found
        scratch = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        manifest = json.loads(json.dumps({"made_of": made_of, **fill(scratch)}))
        manifest["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(scratch.iterdir())
        }
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(scratch, directory)
    return manifest


def track(
    items: Iterable[Any], total: int, title: str, *, step: int = 1, progress: bool = True
) -> Iterator[Any]:
    """The items, under a progress bar that advances by step at each, to total."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(title, total=total)
        for number, item in enumerate(items, 1):
            yield item
            bar.update(task, completed=min(number * step, total))
