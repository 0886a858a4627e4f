"""Several recipes as one training: each stage in a directory of its own, one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastxm.training import checkpoint
from fastxm.training.recipe import Recipe
from fastxm.training.trainer import LoopConfig, Run, is_fresh, train


@dataclass(frozen=True)
class Stage:
    """A part of a training.

    Args:
        name: of its directory.
        recipe: makes it when its turn comes; it may read what the stages before it exported.
        loop: when it stops.
    """

    name: str
    recipe: Callable[[], Recipe]
    loop: LoopConfig

    def ended(self, out: Path) -> bool:
        """Whether its run in `out` has done all its steps and left its model."""
        kept = checkpoint.steps(out / self.name / "checkpoints")
        steps = int(kept[-1].name.removeprefix(checkpoint.PREFIX)) if kept else 0
        model = out / self.name / "model" / "config.json"
        return steps >= self.loop.steps and model.is_file()


def check(stages: Sequence[Stage], out: Path, *, resume: bool) -> None:
    """Raises ValueError where stages have begun in `out` that cannot go on as `train_stages` asks.

    Args:
        stages, out, resume: as of `train_stages`.
    """
    for stage in stages:
        begun = checkpoint.steps(out / stage.name / "checkpoints")
        if not resume:
            is_fresh(out / stage.name)
        elif begun:
            checkpoint.check(begun[-1], stage.recipe().identity())


def train_stages(
    stages: Sequence[Stage],
    out: Path,
    *,
    resume: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> list[Run]:
    """Trains stages in order; with `resume` one that is done is left as it is, others go on.

    Args:
        stages: in their order.
        out: the run's directory; each stage has a run in `out`/name.
        resume: as of `train`.
        tell: is given a line when a stage begins.

    Returns:
        the runs, the last one interrupted if a signal came.

    Raises:
        ValueError: a stage that has begun has another configuration, or there is a run already.
    """
    check(stages, out, resume=resume)
    runs = []
    for stage in stages:
        tell(f"{stage.name}: training in {out / stage.name}")
        runs.append(train(stage.recipe(), out / stage.name, stage.loop, resume=resume))
        if runs[-1].interrupted:
            break
    return runs
