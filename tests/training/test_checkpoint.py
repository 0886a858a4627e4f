"""Checkpoints: whole or absent, of the right run or refused."""

# ruff: noqa: NPY002 (the legacy global generator is what is tested)
import os
import random

import numpy as np
import pytest
import torch

from fastxm.training import checkpoint

STATE = {"a": torch.arange(3), "b": [{"c": torch.ones(2, dtype=torch.bfloat16)}, 1.5, "x", None]}
CPU = torch.device("cpu")
IDENTITY = {"system": "toy", "model": {"gf": 16, "sizes": (4, 8)}}


def test_round_trip(tmp_path):
    path = checkpoint.save(tmp_path, 3, IDENTITY, STATE, keep=1)
    step, state = checkpoint.load(path, IDENTITY)
    assert step == 3
    assert torch.equal(state["a"], STATE["a"])
    assert state["b"][0]["c"].dtype == torch.bfloat16
    assert state["b"][1:] == STATE["b"][1:]


def test_only_the_last_are_kept(tmp_path):
    for step in (2, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, IDENTITY, STATE, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    loaded = [checkpoint.load(p, IDENTITY)[0] for p in checkpoint.steps(tmp_path)]
    assert loaded == [99_999_999, 100_000_000]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_save_cut_short_leaves_the_one_before(tmp_path, monkeypatch, moment):
    checkpoint.save(tmp_path, 1, IDENTITY, STATE, keep=1)

    def cut(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, cut)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save(tmp_path, 2, IDENTITY, STATE, keep=1)
    assert [checkpoint.load(p, IDENTITY)[0] for p in checkpoint.steps(tmp_path)] == [1]
    checkpoint.save(tmp_path, 2, IDENTITY, STATE, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_another_run_s_checkpoint_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, IDENTITY, STATE, keep=1)
    other = {"system": "toy", "model": {"gf": 32, "sizes": (4, 8)}}
    with pytest.raises(ValueError, match=r"another run: model.gf was 16, now 32$"):
        checkpoint.load(path, other)
    with pytest.raises(ValueError, match=r"system was 'toy', now 'xmcgan'"):
        checkpoint.load(path, {**IDENTITY, "system": "xmcgan"})


def test_a_damaged_checkpoint_is_one_error(tmp_path):
    path = checkpoint.save(tmp_path, 1, IDENTITY, STATE, keep=1)
    whole = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        checkpoint.load(path, IDENTITY)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.load(tmp_path / "absent", IDENTITY)


def test_nothing_in_a_checkpoint_can_run(tmp_path):
    path = checkpoint.save(tmp_path, 1, IDENTITY, STATE, keep=1)
    torch.save({"a": os.system}, path / "state.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path, IDENTITY)


def test_random_generators_are_put_back(tmp_path):
    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand(), np.random.randn()

    np.random.randn()  # leaves one normal number in store
    path = checkpoint.save(tmp_path, 1, {}, checkpoint.random_state(CPU), keep=1)
    before = draw()
    checkpoint.set_random_state(checkpoint.load(path, {})[1], CPU)
    assert draw() == before


def offset(state):
    return state.view(torch.int64)[1].item()


def test_a_gpu_s_noise_goes_on_whatever_gpus_are_visible(tmp_path, monkeypatch):
    gpus = {}

    def see(count):
        """As many GPUs, freshly seeded: a state is a seed and an offset."""
        fresh = torch.tensor([7, 0]).view(torch.uint8)
        gpus.update({f"cuda:{i}": fresh.clone() for i in range(count)})
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    def index(device):
        return f"cuda:{torch.device(device).index or 0}"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: gpus[index(device)].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: gpus.update({index(device): state})
    )
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [*gpus.values()])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: pytest.fail("all at once"))
    see(4)
    device = torch.device("cuda:2")
    gpus["cuda:2"].view(torch.int64)[1] = 40  # drawn from
    early = {**checkpoint.random_state(CPU), "cuda": torch.cuda.get_rng_state_all()}
    for state in (checkpoint.random_state(device), early):
        path = checkpoint.save(tmp_path, 1, {}, state, keep=1)
        for count, now in ((1, "cuda"), (2, "cuda:1"), (4, "cuda:3")):
            see(count)
            checkpoint.set_random_state(checkpoint.load(path, {})[1], torch.device(now))
            assert offset(gpus[index(now)]) == 40
            # a training on a CPU neither has nor asks for a GPU's
            assert checkpoint.random_state(CPU)["cuda"] == []
            checkpoint.set_random_state(checkpoint.random_state(CPU), torch.device(now))
            assert offset(gpus[index(now)]) == 40
