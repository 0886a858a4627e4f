"""Configurations of runs: presets by system and name, and a run's config.yaml."""

import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastxm.config import construct as construct
from fastxm.config import convert as convert
from fastxm.config import plain as plain

PRESETS = resources.files("fastxm.presets")


def presets(system: str) -> list[str]:
    """The names of a system's presets."""
    folder = PRESETS / system
    return sorted(p.name[:-5] for p in folder.iterdir()) if folder.is_dir() else []


def preset(system: str, name: str) -> dict[str, Any]:
    """A preset's values.

    Raises:
        ValueError: the system has no preset of that name.
    """
    if name not in presets(system):
        raise ValueError(f"no preset {name!r} for {system}: there are {', '.join(presets(system))}")
    return yaml.safe_load((PRESETS / system / f"{name}.yaml").read_text())


def write(path: Path, system: str, config: Any) -> None:
    """Writes a run's config.yaml; what stood there stays until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(yaml.safe_dump({"system": system, **plain(config)}, sort_keys=False))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read(path: Path, system: str) -> dict[str, Any]:
    """The values of a run's config.yaml.

    Raises:
        ValueError: there is none, it cannot be read, or it is another system's.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"no run to resume: {path} cannot be read") from error
    theirs = values.get("system") if isinstance(values, dict) else None
    if theirs != system:
        raise ValueError(f"{path} is of a {theirs} run, not of {system}")
    return {key: value for key, value in values.items() if key != "system"}
