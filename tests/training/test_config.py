"""Configurations from plain values: sections, conversions, one clear error each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

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


def test_round_trip_through_yaml(tmp_path):
    made = Outer(Inner((3, 4), "b"), rate=2e-4, on=True, minutes=3.0, where=Path("y"))
    config.write(tmp_path / "c.yaml", "toy", made)
    assert config.construct(Outer, config.read(tmp_path / "c.yaml", "toy"), "c") == made


def test_yaml_numbers_without_a_point():
    assert config.construct(Outer, {"rate": "2e-4", "minutes": 14}, "c") == Outer(
        rate=2e-4, minutes=14.0
    )


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
    ],
)
def test_bad_values_are_one_clear_error(values, message):
    with pytest.raises(ValueError, match=message):
        config.construct(Outer, values, "c")


def test_another_system_s_config_is_refused(tmp_path):
    config.write(tmp_path / "c.yaml", "toy", Outer())
    with pytest.raises(ValueError, match="of a toy run, not of xmcgan"):
        config.read(tmp_path / "c.yaml", "xmcgan")
    with pytest.raises(ValueError, match="no run to resume"):
        config.read(tmp_path / "absent.yaml", "xmcgan")
