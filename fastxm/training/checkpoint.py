"""Checkpoints: whole directories, there or not there, never half written.

    checkpoints/step-00000500/{checkpoint.json, state.pt}

checkpoint.json says what was trained; state.pt is a plain dict of tensors and numbers, read with
`weights_only=True`: nothing in it can run.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREFIX = "step-"


def save(
    folder: Path, step: int, identity: dict[str, Any], state: dict[str, Any], keep: int
) -> Path:
    """Writes one checkpoint, then drops all but the last `keep`.

    Args:
        folder: where checkpoints live; made if absent.
        step: the step that was just completed.
        identity: what the checkpoint belongs to, plain values; compared by `load`.
        state: nested dicts and lists of tensors, numbers and strings.
        keep: how many to keep, at least 1.

    Returns:
        the checkpoint's directory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale)
    draft, final = folder / f".tmp-{step:08d}", folder / f"{PREFIX}{step:08d}"
    draft.mkdir()
    with open(draft / "state.pt", "wb") as file:
        torch.save(state, file)
        sync(file)
    with open(draft / "checkpoint.json", "w") as file:
        json.dump({"step": step, "identity": identity}, file, indent=1)
        sync(file)
    sync_folder(draft)
    if final.exists():
        shutil.rmtree(final)
    os.replace(draft, final)
    sync_folder(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    complete = [p for p in folder.glob(f"{PREFIX}*") if (p / "checkpoint.json").is_file()]
    return sorted(complete, key=lambda p: int(p.name.removeprefix(PREFIX)))


def check(path: Path, identity: dict[str, Any]) -> int:
    """The step of a checkpoint of the same system and configuration; its state is not read.

    Args:
        path: a checkpoint's directory.
        identity: as given to `save`.

    Raises:
        ValueError: the checkpoint is of another model or configuration, or is none.
    """
    try:
        header = json.loads((path / "checkpoint.json").read_text())
        theirs, step = header["identity"], header["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint: {error}") from error
    if different := differences(theirs, json.loads(json.dumps(identity))):
        raise ValueError(f"{path} is a checkpoint of another run: {'; '.join(different[:4])}")
    return step


def load(path: Path, identity: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Reads a checkpoint.

    Args:
        path, identity: as in `check`.

    Returns:
        the step, and the state with tensors on the CPU.

    Raises:
        ValueError: as `check`, or the state cannot be read.
    """
    return check(path, identity), read(path)


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, whatever it is of; raises ValueError where it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path / 'state.pt'} cannot be read: {reason}") from error
    return state


def differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """What differs between two trees of plain values, one phrase each."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = dict.fromkeys([*theirs, *ours])
        inside = (differences(theirs.get(k), ours.get(k), f"{name}.{k}".strip(".")) for k in keys)
        return [phrase for phrases in inside for phrase in phrases]
    return [] if theirs == ours else [f"{name} was {theirs!r}, now {ours!r}"]


def random_state(device: torch.device) -> dict[str, Any]:
    """The position of the global random generators that a training on the device draws from.

    Returns:
        plain values and tensors: "cuda" is a list of the device's own, empty of a CPU.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.array(keys)), *rest],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts the global random generators where `random_state` found them, on this device now."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"]:
        # early checkpoints hold those of all visible GPUs: the one that was drawn from is farthest
        # from its seed (a state is a seed and an offset)
        drawn = max(state["cuda"], key=lambda one: one.view(torch.int64)[1].item())
        torch.cuda.set_rng_state(drawn, device)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, *rest = state["numpy"]
    np.random.set_state((kind, numbers.numpy(), *rest))  # noqa: NPY002


def tensors(state: Any) -> Iterator[Tensor]:
    """The tensors in a nested state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)


def finite(state: Any) -> bool:
    """Whether every floating tensor in a nested state is finite; a GPU is waited for once."""
    found: dict[torch.device, list[Tensor]] = {}
    for t in tensors(state):
        if t.is_floating_point():
            found.setdefault(t.device, []).append(t.isfinite().all())
    return all(bool(torch.stack(each).all()) for each in found.values())


def sync(file: Any) -> None:
    """Everything written to an open file is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The folder's own entries are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
