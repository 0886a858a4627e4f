"""Flags from the types of dataclasses and functions, and what goes to standard output."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import tyro


def parse(what: Any, name: str, arguments: list[str], **options: Any) -> Any:
    """A dataclass filled from flags, or a function called with them, by its types.

    Raises:
        ValueError: a flag is unknown, missing or of the wrong kind.
    """
    said = io.StringIO()
    call: Any = what if dataclasses.is_dataclass(what) else postponed(what)
    try:
        with contextlib.redirect_stderr(said):
            made = tyro.cli(call, prog=f"fastxm {name}", args=arguments, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{unboxed(said.getvalue())}; see fastxm {name} --help") from stop
    return made if dataclasses.is_dataclass(what) else made()


def postponed(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """The function with its arguments but not yet called: only reading flags is watched."""

    @functools.wraps(function)
    def later(*positional: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(function, *positional, **named)

    return later


def unboxed(text: str) -> str:
    """The message in the box that tyro draws, without the box."""
    rows = [row.strip("│ ") for row in text.splitlines()]
    rows = [row for row in rows if row.strip("─-╭╮╰╯ ")]
    end = [i for i, row in enumerate(rows) if row.startswith("For full helptext")]
    return " ".join(rows[1 : end[0] if end else None])


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)
