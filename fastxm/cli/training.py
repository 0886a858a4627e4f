"""`fastxm train`: a system, with a preset, flags over it, and a run's directory."""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastxm.cli.flags import parse, say
from fastxm.training import config as configs

if TYPE_CHECKING:
    from fastxm.training.trainer import Run


# recipe, its configuration, and the preset that flags override
SYSTEMS = {
    "xmcgan": ("XMCGANRecipe", "XMCGANTraining", "emoji-64"),
    "lafite": ("LAFITERecipe", "LAFITETraining", "cpu-demo"),
    "vdl": ("VDLRecipe", "VDLTraining", "cpu-demo"),
    "mirrorgan": ("MirrorGANRecipe", "MirrorGANTraining", "cpu-demo"),
    "damsm": ("DAMSMRecipe", "DAMSMTraining", "cpu-demo"),
    "stream": ("STREAMRecipe", "STREAMTraining", "cpu-demo"),
    "selfsup": ("", "SelfSupTraining", "cpu-demo"),
}


def train(arguments: list[str]) -> int:
    """Train a system, or a part of one alone: `fastxm train` names them."""
    systems = ", ".join(TRAIN)
    if not arguments or arguments[0] in ("-h", "--help"):
        say("usage: fastxm train SYSTEM ... [--help]", "", f"SYSTEM: {systems}")
    elif arguments[0] in TRAIN:
        return TRAIN[arguments[0]](arguments[1:])
    else:
        raise ValueError(f"no system {arguments[0]!r} to train: there are {systems}")
    return 0


def exit_code(run: "Run") -> int:
    """What a command ends with: 0, or as a shell has it of a signal."""
    return 128 + run.interrupted if run.interrupted else 0


def classes(system: str) -> tuple[Any, Any]:
    """A system's recipe and the configuration of its training."""
    module = import_module(f"fastxm.training.{system}")
    return tuple(getattr(module, name) for name in SYSTEMS[system][:2])  # type: ignore[return-value]


def train_system(system: str, arguments: list[str]) -> "Run":
    """Train a system; a preset or the run to resume gives what the flags leave out."""
    recipe, training = classes(system)

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Train a system; flags override the preset, with --resume the run's configuration."""

        config: training  # type: ignore[valid-type]
        """What decides the training."""
        preset: Annotated[str, named(system)]
        out: Path
        """The run's directory."""
        resume: bool = False
        """Go on from the last checkpoint in the run's directory."""

    values, preset, out, where = base(system, arguments)
    default = Arguments(configs.construct(training, values, where), preset, out)
    flat = (tyro.conf.OmitArgPrefixes,)
    asked = parse(Arguments, f"train {system}", arguments, default=default, config=flat)
    if system == "mirrorgan":
        from fastxm.training.mirrorgan import train_mirrorgan

        run = train_mirrorgan(asked.config, asked.out, resume=asked.resume, tell=say)
    else:
        from fastxm.training import trainer

        made = recipe(asked.config)
        run = trainer.train(made, asked.out, asked.config.loop, resume=asked.resume)
    from fastxm.training.ranks import number

    if number() == 0:  # of several processes one tells
        finish(run, system, asked.out)
    return run


def named(system: str) -> Any:
    """The flag of a preset, whose help names all that there are."""
    return tyro.conf.arg(help=f"A named configuration: {', '.join(configs.presets(system))}.")


def train_one(system: str, arguments: list[str]) -> int:
    """`train_system` as a command."""
    return exit_code(train_system(system, arguments))


def base(system: str, arguments: list[str]) -> tuple[dict[str, Any], str, Path, str]:
    """The values that flags override: of the preset, or of the run to resume if none is named.

    Returns:
        the values, the preset's name, the run's directory, and where the values come from.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--preset", "--out", "--data"):
        first.add_argument(flag, nargs="?")
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(arguments)
    preset = known.preset or SYSTEMS[system][2]
    values, where = configs.preset(system, preset), f"preset {preset}"
    data = known.data or values["data"]
    named = Path(data)
    if "{" in named.name:  # a pattern of tars: named as their folder is
        named = named.resolve().parent
    out = Path(known.out or f"runs/{system}-{named.name}-{preset}")
    if known.resume and not known.preset:
        return configs.read(out / "config.yaml", system), preset, out, str(out / "config.yaml")
    return values, preset, out, where


def train_selfsup(arguments: list[str]) -> int:
    """Train the self-supervised system, all stages in order."""
    from fastxm.training.selfsup import SelfSupTraining
    from fastxm.training.selfsup import train_selfsup as fit

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Train the self-supervised system; flags override the preset or the run to resume."""

        config: Annotated[SelfSupTraining, tyro.conf.arg(name="")]
        preset: Annotated[str, named("selfsup")]
        out: Path
        """The run's directory."""
        resume: bool = False
        """Go on with the stages that are not done; other families or anchors become stages too."""

    values, preset, out, where = base("selfsup", arguments)
    default = Arguments(configs.construct(SelfSupTraining, values, where), preset, out)
    asked = parse(Arguments, "train selfsup", arguments, default=default)
    runs = fit(asked.config, asked.out, resume=asked.resume)
    for run in runs:
        state = "interrupted" if run.interrupted else "done"
        say(f"{run.out.name:24} {state} after {run.step} steps, {run.seconds / 60:.1f} minutes")
        if run.grid:
            say(f"{'':24} sample grid: {run.grid}")
    if runs[-1].interrupted:
        say(f"go on with: {resuming('selfsup', asked.out)}")
    else:
        say(f"model:  {asked.out / 'model'}")
    return exit_code(runs[-1])


def resuming(system: str, out: Path) -> str:
    """The command that goes on with a run."""
    return f"fastxm train {system} --resume --out {shlex.quote(str(out))}"


def finish(run: "Run", system: str, out: Path) -> None:
    """Says where everything is."""
    state = "interrupted" if run.interrupted else "done"
    say(
        f"{state} after {run.step} steps, {run.seconds / 60:.1f} minutes of training",
        f"run:          {run.out}",
        f"checkpoints:  {run.out / 'checkpoints'}",
        f"model:        {run.model}",
    )
    if run.grid:
        say(f"sample grid:  {run.grid}")
    if run.interrupted:
        say(f"go on with: {resuming(system, out)}")


def train_dual_encoder(arguments: list[str]) -> int:
    """Train the dual encoder that ranks pictures and captions."""
    import torch

    from fastxm.training.dual_encoder import DualEncoderTraining
    from fastxm.training.dual_encoder import train_dual_encoder as fit
    from fastxm.training.ranks import started

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Train the dual encoder that ranks pictures and captions; seconds, with a full cache."""

        config: DualEncoderTraining
        out: Path = Path("runs/dual-encoder")
        """The run's directory."""

    default, flat = Arguments(DualEncoderTraining()), (tyro.conf.OmitArgPrefixes,)
    asked = parse(Arguments, "train dual-encoder", arguments, default=default, config=flat)
    if (asked.out / "config.yaml").exists():
        raise ValueError(f"{asked.out} already holds a run: choose another --out")
    with started(torch.device("cpu")) as ranks:
        model, metrics = fit(asked.config, progress=ranks.first, ranks=ranks)
    if not ranks.first:
        return 0
    configs.write(asked.out / "config.yaml", "dual-encoder", asked.config)
    (asked.out / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    model.save_pretrained(asked.out / "model")
    said = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    say(f"held-out concepts:  {said or 'none'}", f"model:              {asked.out / 'model'}")
    return 0


# what `fastxm train SYSTEM` calls with the arguments after it; returns the exit code
TRAIN: dict[str, Callable[[list[str]], int]] = {
    **{system: partial(train_one, system) for system in SYSTEMS},
    "selfsup": train_selfsup,
    "dual-encoder": train_dual_encoder,
}
