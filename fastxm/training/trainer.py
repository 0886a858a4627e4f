"""The one loop: data -> step -> log, sample, checkpoint. It knows no model."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastxm.ops.memory import keep_freed_memory
from fastxm.training import checkpoint
from fastxm.training import config as configs
from fastxm.training.logging import RunLog
from fastxm.training.marks import mark
from fastxm.training.ranks import Ranks, alone, started
from fastxm.training.recipe import Recipe


@dataclass(frozen=True)
class LoopConfig:
    """When the loop stops and how often it writes; only `deterministic` changes what is drawn."""

    steps: int = 100_000
    """Updates in all, of a GAN those of its generator."""
    max_minutes: float | None = None
    """Stops after so many minutes of training, whichever comes first."""
    log_every: int = 50
    """Steps between lines of metrics."""
    sample_every: int = 500
    """Steps between sample grids."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on the disk."""
    deterministic: bool = True
    """Keep a GPU to algorithms that repeat; without, to its fastest, and no two runs are alike."""

    def __post_init__(self) -> None:
        counts = ("steps", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be above 0, not {self.max_minutes}")


STOPPING = (signal.SIGINT, signal.SIGTERM)


class NonFiniteLoss(RuntimeError):
    """A loss or a weight became infinite or NaN; the last checkpoint is from before."""


@dataclass(frozen=True)
class Run:
    """What a training left behind.

    Args:
        out: the run's directory.
        step: steps completed, over all its parts.
        seconds: time spent training, over all its parts.
        grid: the last sample grid; None where the recipe draws none.
        model: the exported model.
        interrupted: the signal that ended it before its time; 0 for none.
    """

    out: Path
    step: int
    seconds: float
    grid: Path | None
    model: Path
    interrupted: int


@dataclass
class Progress:
    """Where the loop stands: all of it is in the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # not every step has every metric
    counted: int = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.counted += 1

    def average(self, among: Ranks) -> None:
        """Makes the sums those of the whole batch; averaged again they stay the same."""
        if self.sums and among.size > 1:
            (values,) = among.average([torch.stack(list(self.sums.values()))])
            self.sums = dict(zip(self.sums, values.unbind()))

    def means(self) -> dict[str, float]:
        """The means since the last call to `clear`; the one place that waits for the device."""
        if not self.sums:
            return {}
        values = torch.stack(list(self.sums.values())).tolist()
        return {name: value / self.counts[name] for name, value in zip(self.sums, values)}

    def clear(self) -> None:
        self.sums, self.counts, self.counted = {}, {}, 0


def train(recipe: Recipe, out: Path, loop: LoopConfig, *, resume: bool = False) -> Run:
    """Trains a recipe until `loop` says stop, and exports its model to `out`/model.

    On a CPU the process keeps from then on the memory that it frees (glibc's malloc). Of several
    processes (`ranks`) each calls this: the first alone writes, and they stop together.

    Args:
        recipe: the system; built here.
        out: the run's directory; its checkpoints are continued only with `resume`.
        loop: when to stop and to write.
        resume: goes on from the last checkpoint in `out` if there is one.

    Raises:
        ValueError: `out` holds a run and `resume` is false, the checkpoint is another system's, or
            there are several processes, which the recipe does not span.
        NonFiniteLoss: training diverged.
    """
    if not recipe.spans:
        alone(recipe.system)
    if not resume:
        is_fresh(out)
    kept = checkpoint.steps(out / "checkpoints")
    last = kept[-1] if kept else None
    if last:
        checkpoint.check(last, recipe.identity())
    if recipe.device.type == "cpu":
        keep_freed_memory()
    with started(recipe.device) as recipe.ranks:
        progress = begin(recipe, last)
        if not loop.deterministic:  # which building made a GPU's algorithms
            torch.use_deterministic_algorithms(False)
        with open_log(recipe, out, progress.step) as log, stop_signals() as stopped:
            run = Loop(recipe, out, loop, log, progress)
            while not recipe.ranks.any(run.finished() or bool(stopped)):
                run.step()
            came = [int(n) for n in STOPPING if recipe.ranks.any(n in stopped)]
            return run.close(came[0] if came else 0)


def begin(recipe: Recipe, last: Path | None) -> Progress:
    """Builds a recipe and puts it where the last checkpoint left it; the same on all ranks."""
    among, name = recipe.ranks, last.name if last else "no checkpoint"
    if among.any(among.of_first(name) != name):
        raise ValueError(f"processes of one training share its directory; this one sees {name}")
    recipe.build()
    if last:
        progress = restore(recipe, last)
    else:
        progress = Progress(recipe.begin())
    among.copy_first(list(checkpoint.tensors(recipe.state_dict())))
    if among.size > 1:
        state = among.of_first(checkpoint.random_state(recipe.device))
        checkpoint.set_random_state(state, recipe.device)
    return progress


def open_log(
    recipe: Recipe, out: Path, step: int
) -> contextlib.AbstractContextManager[RunLog | None]:
    """The run's files, which the first rank writes."""
    if not recipe.ranks.first:
        return contextlib.nullcontext()
    configs.write(out / "config.yaml", recipe.system, recipe.config)
    return RunLog(out, step)


def is_fresh(out: Path) -> None:
    """Raises ValueError where a directory holds a run."""
    if checkpoint.steps(out / "checkpoints") or (out / "metrics.jsonl").exists():
        raise ValueError(
            f"{out} already holds a run: add --resume to go on, or choose another --out"
        )


class Loop:
    """One run in motion; without a log, a rank that writes nothing."""

    def __init__(
        self, recipe: Recipe, out: Path, loop: LoopConfig, log: RunLog | None, at: Progress
    ):
        self.recipe, self.out, self.loop, self.log, self.at = recipe, out, loop, log, at
        self.batches = iter(recipe.batches)
        self.saved_at = at.step
        self.grid: Path | None = None
        self.grid_at = -1
        self.began = time.perf_counter() - at.seconds
        self.marked = (at.step, time.perf_counter())

    def finished(self) -> bool:
        minutes = self.loop.max_minutes
        in_time = minutes is None or self.at.seconds < 60 * minutes
        return self.at.step >= self.loop.steps or not in_time

    def step(self) -> None:
        with mark("batch"):
            batch = next(self.batches)
        with mark("step"):
            self.at.add(self.recipe.step(batch))
        self.at.step += 1
        step = self.at.step
        self.at.seconds = time.perf_counter() - self.began
        done = step / self.loop.steps
        if self.loop.max_minutes is not None:
            done = max(done, self.at.seconds / (60 * self.loop.max_minutes))
        if self.log:
            self.log.advance(step, min(done, 1.0))
        if step % self.loop.log_every == 0:
            self.write_metrics()
        if step % self.loop.sample_every == 0:
            self.draw()
        if step % self.loop.checkpoint_every == 0:
            self.save()

    def write_metrics(self) -> None:
        means = self.checked_means()
        step, (since, then), now = self.at.step, self.marked, time.perf_counter()
        speed = (step - since) * self.recipe.images_per_step / (now - then)
        self.at.seconds = now - self.began
        if self.log:
            self.log.metrics(step, means, speed, self.at.seconds)
        self.marked = (step, now)
        self.at.clear()

    def checked_means(self) -> dict[str, float]:
        self.at.average(self.recipe.ranks)
        means = self.at.means()
        bad = [
            f"{name} = {value}" for name, value in means.items() if not abs(value) < float("inf")
        ]
        if bad:
            first = self.at.step - self.at.counted + 1
            self.diverged(f"{', '.join(bad)} in steps {first} to {self.at.step}")
        return means

    def diverged(self, what: str) -> None:
        kept = checkpoint.steps(self.out / "checkpoints")
        where = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise NonFiniteLoss(f"training diverged: {what}; {where}")

    def draw(self) -> None:
        if self.log is None or self.grid_at == self.at.step:
            return
        with mark("sample"):
            samples = self.recipe.sample()
        if samples is not None:
            self.grid = self.log.samples(self.at.step, samples.images, samples.captions)
        if figures := self.recipe.held_out():
            self.log.held_out(self.at.step, figures)
        self.grid_at = self.at.step

    def save(self) -> None:
        self.checked_means()
        recipe = self.recipe.state_dict()
        if not checkpoint.finite(recipe):
            self.diverged(f"a weight is not finite after step {self.at.step}")
        self.saved_at = self.at.step
        if self.log is None:
            return
        self.log.sync()
        state = {
            "recipe": recipe,
            "random": checkpoint.random_state(self.recipe.device),
            "seconds": self.at.seconds,
            "sums": self.at.sums,
            "counts": self.at.counts,
            "counted": self.at.counted,
        }
        folder, keep = self.out / "checkpoints", self.loop.keep_checkpoints
        with mark("checkpoint"):
            checkpoint.save(folder, self.at.step, self.recipe.identity(), state, keep)

    def close(self, interrupted: int) -> Run:
        if self.at.step > self.saved_at:
            self.save()
        self.draw()
        at, model = self.at, self.out / "model"
        if self.log:
            self.recipe.export(model)
        self.recipe.ranks.any(False)  # all leave when the model is there
        return Run(self.out, at.step, at.seconds, self.grid, model, interrupted)


def restore(recipe: Recipe, path: Path) -> Progress:
    """Puts a built recipe and the global random generators where a checkpoint left them."""
    step, state = checkpoint.load(path, recipe.identity())
    recipe.load_state_dict(state["recipe"])
    checkpoint.set_random_state(state["random"], recipe.device)
    sums = {name: value.to(recipe.device) for name, value in state["sums"].items()}
    return Progress(step, state["seconds"], sums, state["counts"], state["counted"])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM comes: the step in hand is finished first.

    A second signal acts as it always does.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in STOPPING:
            before[number] = signal.signal(number, note)
    except ValueError:  # only the main thread may set handlers
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
