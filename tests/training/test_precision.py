"""Which precision a training has where none is asked for."""

import dataclasses

import pytest
import torch
from small import recipe

from fastxm.training import config, precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("level", "picked"), [("bfloat16", "bf16"), ("float32", "fp32"), ("", "fp32")]
)
def test_auto_is_what_the_processor_multiplies(monkeypatch, level, picked):
    monkeypatch.setattr(precision, "LEVEL", level)
    assert precision.pick_precision("auto", CPU) == picked
    assert [precision.pick_precision(p, CPU) for p in ("bf16", "fp32")] == ["bf16", "fp32"]


@pytest.mark.parametrize("has", [True, False])
def test_auto_on_a_gpu(monkeypatch, has):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert precision.pick_precision("auto", gpu) == ("bf16" if has else "fp32")
    if not has:
        with pytest.raises(ValueError, match="Tesla T4 has no bf16"):
            precision.pick_precision("bf16", gpu)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [str(precision.pick_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")]
    assert found == ["cuda", "cpu", "cuda", "cuda:1"]
    for name in ("mps", "meta", "xpu", "cpu:", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"device is auto, cpu or cuda, not '{name}'"):
            precision.pick_device(name)
    with pytest.raises(ValueError, match="device is cuda:0 to cuda:1, not cuda:2"):
        precision.pick_device("cuda:2")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert [str(precision.pick_device(name)) for name in ("auto", "cuda")] == ["cuda:1"] * 2
    with pytest.raises(ValueError, match="each of 4 processes takes its own GPU: no device cuda:0"):
        precision.pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device is cuda:0 to cuda:1, not cuda:2"):
        precision.pick_device("auto")


def test_a_run_remembers_what_was_picked(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "LEVEL", "bfloat16")
    ours = recipe(folder, precision="auto")
    config.write(tmp_path / "config.yaml", ours.system, ours.config)
    kept = config.read(tmp_path / "config.yaml", ours.system)
    assert kept["precision"] == "bf16"
    monkeypatch.setattr(precision, "LEVEL", "float32")  # resumed elsewhere
    again = config.construct(type(ours.config), kept, "config.yaml")
    assert type(ours)(dataclasses.replace(again, device="cpu")).config.precision == "bf16"
