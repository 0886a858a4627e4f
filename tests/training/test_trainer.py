"""The loop: resuming, stopping, diverging; on a recipe with no model worth the name."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import Toy

from fastxm.training import checkpoint, marks, trainer
from fastxm.training.marks import mark
from fastxm.training.trainer import LoopConfig, NonFiniteLoss, train

LOOP = LoopConfig(steps=20, log_every=3, sample_every=10, checkpoint_every=7, keep_checkpoints=2)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_says(tmp_path):
    run = train(Toy(), tmp_path / "run", LOOP)
    assert run.step == 20
    assert not run.interrupted
    assert [line["step"] for line in lines(run.out)] == [3, 6, 9, 12, 15, 18]
    assert set(lines(run.out)[0]) == {"step", "loss", "weight"}
    kept = [path.name for path in checkpoint.steps(run.out / "checkpoints")]
    assert kept == ["step-00000014", "step-00000020"]
    assert run.grid == run.out / "samples" / "00000020.png"
    assert run.grid.stat().st_size > 0
    assert (run.model / "weight.txt").exists()
    assert list((run.out / "tensorboard").iterdir())


def test_a_profiler_sees_named_ranges(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def noted(name):
        began.append(name)
        yield
        ended.append(name)

    began, ended = [], []
    monkeypatch.setattr(trainer, "mark", noted)
    train(Toy(), tmp_path / "run", LoopConfig(steps=2, sample_every=1, checkpoint_every=2))
    step = ["batch", "step", "sample"]
    assert began == ended == [*step, *step, "checkpoint"]


def test_ranges_are_nvtx_s_where_it_is_installed(monkeypatch):
    if marks.nvtx:
        assert isinstance(mark("step"), type(marks.nvtx.annotate("step")))
    monkeypatch.setattr(marks, "nvtx", None)
    with mark("step"):
        pass


def test_one_of_many_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    with pytest.raises(ValueError, match="toy trains in one process"):
        train(Toy(), tmp_path / "run", LOOP)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_algorithms_that_repeat_are_a_choice(tmp_path, monkeypatch, kept):
    class Deterministic(Toy):
        def build(self):
            torch.use_deterministic_algorithms(True, warn_only=True)  # as on a GPU
            super().build()

        def step(self, batch):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().step(batch)

    seen, before = [], torch.are_deterministic_algorithms_enabled()
    try:
        train(Deterministic(), tmp_path / "run", LoopConfig(steps=1, deterministic=kept))
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
    assert seen == [kept]


def test_metrics_are_means_over_the_interval(tmp_path):
    every = train(Toy(), tmp_path / "a", LoopConfig(steps=6, log_every=1))
    third = train(Toy(), tmp_path / "b", LoopConfig(steps=6, log_every=3))
    losses = [line["loss"] for line in lines(every.out)]
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    torch.testing.assert_close([line["loss"] for line in lines(third.out)], means)


@pytest.mark.parametrize("first", [5, 7, 13])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, first):
    whole = train(Toy(), tmp_path / "whole", LOOP)
    broken = tmp_path / "broken"
    train(Toy(), broken, LoopConfig(steps=first, log_every=3, checkpoint_every=7))
    torch.rand(5)  # whatever else the process drew meanwhile
    resumed = train(Toy(), broken, LOOP, resume=True)
    assert (broken / "metrics.jsonl").read_bytes() == (whole.out / "metrics.jsonl").read_bytes()
    assert (resumed.model / "weight.txt").read_text() == (whole.model / "weight.txt").read_text()


def test_killed_at_any_moment_it_resumes_to_the_same_metrics(tmp_path):
    steps = 200
    loop = LoopConfig(steps=steps, log_every=3, sample_every=50, checkpoint_every=7)
    whole = train(Toy(), tmp_path / "whole", loop)
    out, script = tmp_path / "killed", Path(__file__).with_name("toy.py")
    command = [sys.executable, str(script), str(out), str(steps)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(checkpoint.steps(out / "checkpoints")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert lines(out)[-1]["step"] < steps
    train(Toy(), out, loop, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (whole.out / "metrics.jsonl").read_bytes()


def test_resume_drops_lines_after_the_checkpoint(tmp_path):
    train(Toy(), tmp_path, LoopConfig(steps=7, log_every=3, checkpoint_every=7))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 12, "lo')
    train(Toy(), tmp_path, LoopConfig(steps=9, log_every=3), resume=True)
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 9]


def test_a_run_is_not_overwritten(tmp_path):
    train(Toy(), tmp_path, LoopConfig(steps=3, log_every=3))
    with pytest.raises(ValueError, match="already holds a run"):
        train(Toy(), tmp_path, LOOP)


def test_another_configuration_does_not_go_on(tmp_path):
    train(Toy(width=3), tmp_path, LoopConfig(steps=3, log_every=3))
    before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="another run: width was 3, now 4"):
        train(Toy(width=4), tmp_path, LOOP, resume=True)
    assert before == (
        (tmp_path / "metrics.jsonl").read_bytes(),
        (tmp_path / "config.yaml").read_bytes(),
    )


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"loss = nan.*steps 10 to 12.*step-00000007"):
        train(Toy(nan_at=10), tmp_path, LOOP)
    kept = checkpoint.steps(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step-00000007"]
    _, state = checkpoint.load(kept[0], {"system": "toy", "width": 3})
    assert checkpoint.finite(state)


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    # the loss of step 7 is finite still: only its update is not
    class Exploding(Toy):
        def step(self, batch):
            metrics = super().step(batch)
            if self.steps_done == 7:
                self.players["net"].network.weight.data.fill_(float("inf"))
            return {"loss": metrics["loss"]}

    with pytest.raises(NonFiniteLoss, match="a weight is not finite after step 7"):
        train(Exploding(), tmp_path, LOOP)
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_max_minutes_stops_and_can_be_prolonged(tmp_path):
    short = LoopConfig(steps=10**9, max_minutes=1e-9, log_every=3, checkpoint_every=7)
    run = train(Toy(), tmp_path, short)
    assert run.step <= 1
    more = train(Toy(), tmp_path, LOOP, resume=True)
    assert more.step == 20
    assert more.seconds > run.seconds


def test_a_signal_finishes_the_step_and_saves(tmp_path):
    class Signalled(Toy):
        def step(self, batch):
            if self.steps_done == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step(batch)

    before = signal.getsignal(signal.SIGINT)
    run = train(Signalled(), tmp_path / "run", LOOP)
    assert run.interrupted == signal.SIGINT
    assert run.step == 5
    assert [p.name for p in checkpoint.steps(run.out / "checkpoints")] == ["step-00000005"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("field", ["steps", "log_every", "checkpoint_every", "keep_checkpoints"])
def test_counts_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        LoopConfig(**{field: 0})


def test_freed_memory_is_kept(tmp_path):
    script = """
import resource, torch
from fastxm.ops.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(12 << 20).zero_()  # 48 MiB: 12,288 pages, or 24 of 2 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), int(keep_freed_memory()))
faults()  # until the heap has room
print(faults())
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    before, kept, after = map(int, printed.stdout.split())
    name, version = platform.libc_ver()
    assert kept == (name == "glibc")
    if kept and tuple(map(int, version.split("."))) >= (2, 35):
        assert before >= 20 * 24
        assert after < before / 10


def test_training_on_a_cpu_keeps_the_memory_that_it_frees(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trainer, "keep_freed_memory", lambda: calls.append(1))
    train(Toy(), tmp_path / "cpu", LOOP)
    assert len(calls) == 1


def test_means_are_over_the_steps_that_have_a_metric():
    progress = trainer.Progress()
    for step in range(4):
        now_and_then = {"r1": torch.tensor(float(step))} if step % 2 else {}
        progress.add({"loss": torch.tensor(1.0 + step), **now_and_then})
    assert progress.means() == {"loss": 2.5, "r1": 2.0}
    progress.clear()
    assert progress.means() == {}
