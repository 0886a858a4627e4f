"""The benchmarks run, at tiny shapes: providers agree, absent ones say so, files are written."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("op", ["info_nce", "region_word", "modulation"])
def test_op(op, device, tmp_path):
    script = importlib.import_module(f"bench_{op}")
    argv = ["--quick", "--device", device, "--out", str(tmp_path), "--providers"]
    rows = script.run([*argv, "eager", "fastxm", "memeff"])
    written = json.loads((tmp_path / f"{op}.json").read_text())
    assert len(written["rows"]) == len(rows)
    assert {"chip", "torch", "commit"} <= set(written)
    by_name = {row["provider"]: row for row in written["rows"]}
    assert [row for row in rows if "error" in row] == []
    # two correct ways of a float32 function differ by rounding only
    for name in ("fastxm", "fastxm reference"):
        assert by_name[name]["difference"] < 1e-4
        assert by_name[name]["forward_ms"] > 0
        assert by_name[name]["forward_backward_of_limit"] > 0


def test_failure_is_a_row(monkeypatch, tmp_path, capsys):
    script = importlib.import_module("bench_modulation")

    def broken(*_):
        raise ValueError("told to fail")

    monkeypatch.setattr(script, "eager", broken)
    rows = script.run(["--quick", "--device", "cpu", "--providers", "eager", "fastxm"])
    assert rows[1]["error"] == "ValueError: told to fail"
    assert all("error" not in row for row in rows[2:])
    assert "eager: FAILED: ValueError: told to fail" in capsys.readouterr().out


def test_peak_memory_sees_what_a_call_allocates():
    memory = importlib.import_module("memory")

    def call():
        first = torch.ones(5_000_000)  # 20 MB
        second = first + 1
        return second

    call()
    found = memory.peak_memory(call, "cpu")
    if found is None:
        pytest.skip("this system does not tell the high-water mark")
    assert found == pytest.approx(40, abs=4)


def test_shapes_on_the_command_line():
    common = importlib.import_module("common")
    default = {"N": 4, "D": 8, "dtype": "float32"}
    assert common.parse_shape("N=16,dtype=bfloat16", default) == default | {
        "N": 16,
        "dtype": "bfloat16",
    }
    with pytest.raises(SystemExit, match="a shape has N, D, dtype, not M"):
        common.parse_shape("M=3", default)
