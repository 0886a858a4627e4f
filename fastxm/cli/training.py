"""`fastxm train`: a system, with a preset, flags over it, and a run's directory."""

import argparse
import dataclasses
import json
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
STAGES = ("damsm", "stream")  # of MirrorGAN, before its own


def train(arguments: list[str]) -> None:
    """Train a system: xmcgan, mirrorgan (its stages: damsm, stream), selfsup, lafite, vdl,
    dual-encoder."""
    systems = [*SYSTEMS, "dual-encoder"]
    if not arguments or arguments[0] in ("-h", "--help"):
        say("usage: fastxm train SYSTEM ... [--help]", "", f"SYSTEM: {', '.join(systems)}")
    elif arguments[0] == "dual-encoder":
        train_dual_encoder(arguments[1:])
    elif arguments[0] == "selfsup":
        train_selfsup(arguments[1:])
    elif arguments[0] in SYSTEMS:
        train_system(arguments[0], arguments[1:])
    else:
        raise ValueError(f"no system {arguments[0]!r} to train: there are {', '.join(systems)}")


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
        preset: str
        """A named configuration."""
        out: Path
        """The run's directory."""
        resume: bool = False
        """Go on from the last checkpoint in the run's directory."""

    values, preset, out, where = base(system, arguments)
    default = Arguments(configs.construct(training, values, where), preset, out)
    flat = (tyro.conf.OmitArgPrefixes,)
    asked = parse(Arguments, f"train {system}", arguments, default=default, config=flat)
    config, made, halted = asked.config, recipe(asked.config), None
    if system == "mirrorgan":
        made.stages = asked.out
        halted = after_stages(config, asked.out, asked.resume)
    run = halted or loop(made, asked.out, config.loop, resume=asked.resume)
    finish(run, asked.out)
    return run


def loop(*arguments: Any, **options: Any) -> "Run":
    from fastxm.training.trainer import train

    return train(*arguments, **options)


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
    out = Path(known.out or f"runs/{system}-{Path(data).name}-{preset}")
    if known.resume and not known.preset:
        return configs.read(out / "config.yaml", system), preset, out, str(out / "config.yaml")
    return values, preset, out, where


def after_stages(config: Any, out: Path, resume: bool) -> "Run | None":
    """Trains the stages of MirrorGAN that no run is given of, each in a directory inside `out`.

    A stage that was stopped goes on, one that has ended is used as it is.

    Returns:
        the stage's run that a signal ended, if any.
    """
    from fastxm.models.pretrained import find_model
    from fastxm.training.trainer import is_fresh

    if not resume:
        is_fresh(out)
    for path in filter(None, (getattr(config, stage) for stage in STAGES)):
        find_model(path)
    if not (out / "config.yaml").exists():
        configs.write(out / "config.yaml", "mirrorgan", config)  # to resume from, in any stage
    for stage in STAGES:
        if getattr(config, stage):
            continue
        recipe, training = classes(stage)
        folder = out / stage
        values, where = configs.preset(stage, config.stages), f"preset {config.stages}"
        if (folder / "config.yaml").exists():
            where = str(folder / "config.yaml")
            values = configs.read(folder / "config.yaml", stage)
        asked = {"data": config.data, "device": config.device}
        size = config.model.image_size
        made = configs.construct(training, {**values, **asked, "image_size": size}, where)
        if ended(folder, made.loop):
            say(f"{stage}: {folder} has ended, and is used as it is")
        else:
            say(f"{stage}: training in {folder}")
            run = loop(recipe(made), folder, made.loop, resume=True)
            if run.interrupted:
                return run
    return None


def ended(folder: Path, loop: Any) -> bool:
    """Whether a run has done all its steps and left its model."""
    from fastxm.training import checkpoint

    kept = checkpoint.steps(folder / "checkpoints")
    steps = int(kept[-1].name.removeprefix(checkpoint.PREFIX)) if kept else 0
    return steps >= loop.steps and (folder / "model" / "config.json").is_file()


def train_selfsup(arguments: list[str]) -> "list[Run]":
    """Train the self-supervised system, all stages in order."""
    from fastxm.training.selfsup import SelfSupTraining
    from fastxm.training.selfsup import train_selfsup as fit

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Train the self-supervised system; flags override the preset or the run to resume."""

        config: Annotated[SelfSupTraining, tyro.conf.arg(name="")]
        preset: str
        """A named configuration."""
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
        say(f"go on with the same command and --resume --out {asked.out}")
    else:
        say(f"model:  {asked.out / 'model'}")
    return runs


def finish(run: "Run", out: Path) -> None:
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
        say(f"go on with the same command and --resume --out {out}")


def train_dual_encoder(arguments: list[str]) -> None:
    """Train the dual encoder that ranks pictures and captions."""
    from fastxm.training.dual_encoder import DualEncoderTraining
    from fastxm.training.dual_encoder import train_dual_encoder as fit

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
    model, metrics = fit(asked.config)
    configs.write(asked.out / "config.yaml", "dual-encoder", asked.config)
    (asked.out / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    model.save_pretrained(asked.out / "model")
    said = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    say(f"held-out concepts:  {said or 'none'}", f"model:              {asked.out / 'model'}")
