"""Dataclasses from plain values and back: what YAML and JSON files hold."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def construct(cls: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass from nested plain values; what they leave out keeps its default.

    Args:
        cls: a dataclass, whose fields may be dataclasses.
        values: field name -> value.
        where: what the values come from, for the error.

    Raises:
        ValueError: a name is no field, or a value is not of its field's type.
    """
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - {f.name for f in dataclasses.fields(cls)}):  # type: ignore[arg-type]
        raise ValueError(f"{where}: {cls.__name__} has no field {', '.join(unknown)}")
    made = {key: convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    return cls(**made)


def convert(hint: Any, value: Any, where: str) -> Any:
    """A plain value as a field's type asks: sections, tuples, paths, numbers like 2e-4."""
    kinds = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    if value is None and types.NoneType in kinds:
        return None
    kind = next(k for k in kinds if k is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is a section, not {value!r}")
        return construct(typing.cast(type, kind), value, where)
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{where} is one of {typing.get_args(kind)}, not {value!r}")
        return value
    loses = (
        value is None
        or (origin is int and isinstance(value, float) and not value.is_integer())
        or (origin is str and isinstance(value, (list, dict)))
        or (origin is tuple and isinstance(value, str))  # which would be its letters
    )
    if loses or isinstance(value, bool) != (origin is bool):
        raise ValueError(f"{where} must be {origin.__name__}, not {value!r}")
    try:
        return origin(value)  # YAML reads 2e-4 as text, and a tuple as a list
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must be {origin.__name__}, not {value!r}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object, but a {type(found).__name__}")
    return found


def plain(config: Any) -> Any:
    """A dataclass as nested plain values, fit for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config
