"""Configurations from plain values: sections, conversions, one clear error each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from fastxm.config import read_object
from fastxm.training import config


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    rate: float = 0.1
    on: bool = False
    minutes: float | None = None
    where: Path = Path("x")
    count: int = 3
    name: str = "x"


def test_round_trip_through_yaml(tmp_path):
    made = Outer(Inner((3, 4), "b"), rate=2e-4, on=True, minutes=3.0, where=Path("y"))
    config.write(tmp_path / "c.yaml", "toy", made)
    assert config.construct(Outer, config.read(tmp_path / "c.yaml", "toy"), "c") == made


def test_a_write_that_fails_leaves_what_stood_there(tmp_path, monkeypatch):
    config.write(tmp_path / "c.yaml", "toy", Outer())

    def killed(path, text):
        path.open("w").write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        config.write(tmp_path / "c.yaml", "toy", Outer(rate=2.0))
    assert config.construct(Outer, config.read(tmp_path / "c.yaml", "toy"), "c") == Outer()
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_yaml_numbers_without_a_point():
    values = {"rate": "2e-4", "minutes": 14, "count": 2.0, "name": 2024}
    expected = Outer(rate=2e-4, minutes=14.0, count=2, name="2024")
    assert config.construct(Outer, values, "c") == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rat": 1}, "c: Outer has no field rat"),
        ({"inner": {"size": 1}}, "c: inner: Inner has no field size"),
        ({"inner": 3}, "c: inner is a section, not 3"),
        ({"inner": {"kind": "z"}}, r"c: inner: kind is one of \('a', 'b'\), not 'z'"),
        ({"rate": "fast"}, "c: rate must be float, not 'fast'"),
        ({"rate": True}, "c: rate must be float, not True"),
        ({"on": 1}, "c: on must be bool, not 1"),
        ({"rate": None}, "c: rate must be float, not None"),
        ({"count": 2.7}, r"c: count must be int, not 2\.7"),
        ({"name": None}, "c: name must be str, not None"),
        ({"name": ["a"]}, r"c: name must be str, not \['a'\]"),
        ({"inner": {"sizes": "12"}}, "c: inner: sizes must be tuple, not '12'"),
    ],
)
def test_bad_values_are_one_clear_error(values, message):
    with pytest.raises(ValueError, match=message):
        config.construct(Outer, values, "c")


def test_a_json_file_holds_one_object(tmp_path):
    path = tmp_path / "c.json"
    for text, message in {
        "[1]": "not a JSON object, but a list",
        "{": "is not JSON",
        "\xff": "is not JSON: 'utf-8' codec",
    }.items():
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=rf"c\.json {message}|c\.json is {message}"):
            read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}


def test_another_system_s_config_is_refused(tmp_path):
    config.write(tmp_path / "c.yaml", "toy", Outer())
    with pytest.raises(ValueError, match="of a toy run, not of xmcgan"):
        config.read(tmp_path / "c.yaml", "xmcgan")
    with pytest.raises(ValueError, match="no run to resume"):
        config.read(tmp_path / "absent.yaml", "xmcgan")
