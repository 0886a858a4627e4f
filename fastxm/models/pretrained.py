"""A model as a folder: config.json and model.safetensors, written whole or not at all."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastxm.config import construct, read_object

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Self = TypeVar("Self", bound="Pretrained")


class Pretrained(nn.Module):
    """Adds `save_pretrained` and `from_pretrained` to a model that is built from a dataclass."""

    model_type: ClassVar[str]
    config_class: ClassVar[type[Any]]
    config: Any

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors; what stood there stays until both are whole.

        Args:
            directory: made if it does not exist.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": self.model_type, **dataclasses.asdict(self.config)}
        weights, text = (folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG))
        try:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, weights)
            text.write_text(json.dumps(config, indent=2) + "\n")
            weights.chmod(text.stat().st_mode)  # safetensors lets its owner alone read a file
            os.replace(weights, folder / WEIGHTS)
            os.replace(text, folder / CONFIG)
        finally:
            weights.unlink(missing_ok=True)
            text.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls: type[Self], directory: str | os.PathLike[str]) -> Self:
        """Reads what `save_pretrained` wrote, in eval mode on the CPU.

        Args:
            directory: a folder with config.json and model.safetensors.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: they are damaged, of another model, or do not fit each other.
        """
        folder = Path(directory)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no saved {cls.model_type}: it has no {name}")
        model = cls(cls.read_config(folder / CONFIG))
        try:
            weights = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
            raise ValueError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {first}") from error
        return model.eval()

    @classmethod
    def read_config(cls, path: Path) -> Any:
        """The config dataclass from a config.json of this model."""
        fields = read_object(path)
        kind = fields.pop("model_type", None)
        if kind != cls.model_type:
            raise ValueError(f"{path} is of model type {kind!r}, not {cls.model_type!r}")
        return construct(cls.config_class, fields, str(path))


def find_model(path: str | os.PathLike[str]) -> Path:
    """The model's own directory, from that or its run's.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (Path(path) / "model", Path(path)):
        if (folder / CONFIG).is_file():
            return folder
    raise FileNotFoundError(f"no model in {path}: give a finished run's directory, or a model's")
