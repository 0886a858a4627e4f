"""The command line: prepare, train, sample, evaluate, bench, doctor, demo."""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Column, Table

import fastxm
from fastxm.training import config as configs

if TYPE_CHECKING:
    from fastxm.models.xmcgan import XMCGAN
    from fastxm.training.trainer import Run

DEFAULT_PRESET = "emoji-64"
DEMO_CAPTIONS = [
    *("red apple in twemoji style", "red apple in openmoji style"),
    *("blue heart in twemoji style", "smiling face in openmoji style"),
    *("frog in twemoji style", "woman with red hair in openmoji style"),
    *("the flag of France in twemoji style", "house with garden in openmoji style"),
]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; what the user can mend ends as one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(fastxm.__version__)
        return 0
    try:
        return command(arguments[0])(arguments[1:]) or 0
    except BrokenPipeError:
        return closed()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if traceback or not expected(error):
            raise
        print(f"fastxm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def closed() -> int:
    """Whoever read standard output has gone: nothing more is written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def expected(error: Exception) -> bool:
    """Whether an error is an answer to what the user asked for, not a fault of the program."""
    from fastxm.training.trainer import NonFiniteLoss

    return not isinstance(error, RuntimeError) or isinstance(error, NonFiniteLoss)


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {explain(run)}" for name, run in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastxm COMMAND ... [--help] [--traceback]",
            "",
            "Cross-modal generators, trained fast.",
            "",
            *rows,
        ]
    )


def explain(run: Callable[..., Any]) -> str:
    return (run.__doc__ or "").splitlines()[0]


def command(name: str) -> Callable[[list[str]], int | None]:
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}: there are {', '.join(COMMANDS)}")
    return COMMANDS[name]


def parse(what: Any, name: str, arguments: list[str], **options: Any) -> Any:
    """A dataclass filled from flags, or a function called with them, by its types.

    Raises:
        ValueError: a flag is unknown, missing or of the wrong kind.
    """
    said = io.StringIO()
    call: Any = what if dataclasses.is_dataclass(what) else postponed(what)
    try:
        with contextlib.redirect_stderr(said):
            made = tyro.cli(call, prog=f"fastxm {name}", args=arguments, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{unboxed(said.getvalue())}; see fastxm {name} --help") from stop
    return made if dataclasses.is_dataclass(what) else made()


def postponed(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """The function with its arguments but not yet called: only reading flags is watched."""

    @functools.wraps(function)
    def later(*positional: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(function, *positional, **named)

    return later


def unboxed(text: str) -> str:
    """The message in the box that tyro draws, without the box."""
    rows = [row.strip("│ ") for row in text.splitlines()]
    rows = [row for row in rows if row.strip("─-╭╮╰╯ ")]
    end = [i for i, row in enumerate(rows) if row.startswith("For full helptext")]
    return " ".join(rows[1 : end[0] if end else None])


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def prepare(arguments: list[str]) -> None:
    """Read a data set and encode its captions into the cache."""

    def run(
        data: tyro.conf.Positional[str] = "emoji",
        /,
        image_size: int = 64,
        text_encoder: str = "minilm",
        words: int = 17,
    ) -> None:
        """Read a data set and encode its captions into the cache, once.

        Args:
            data: "emoji", or a folder of captioned pictures.
            image_size: side of the pictures.
            text_encoder: minilm, a local directory or a hub name; "none" leaves captions as text.
            words: word slots of a caption.
        """
        from fastxm import data as sets
        from fastxm import encoders

        encoder = None
        if text_encoder != "none":
            encoder = encoders.text_encoder(text_encoder, max_length=words)
        splits = sets.prepare(data, image_size, encoder)
        counts = ", ".join(f"{len(part)} {name}" for name, part in splits.items())
        train = splits["train"]
        say(f"{train.name}: {counts} pictures of {image_size} px in {train.cache_dir}")
        for path, reason in train.skipped:
            say(f"skipped {path}: {reason}")

    parse(run, "prepare", arguments)


def train(arguments: list[str]) -> None:
    """Train a system: xmcgan or dual-encoder."""
    systems = {"xmcgan": train_xmcgan, "dual-encoder": train_dual_encoder}
    if not arguments or arguments[0] in ("-h", "--help"):
        say("usage: fastxm train SYSTEM ... [--help]", "", f"SYSTEM: {', '.join(systems)}")
        return
    if arguments[0] not in systems:
        raise ValueError(f"no system {arguments[0]!r} to train: there are {', '.join(systems)}")
    systems[arguments[0]](arguments[1:])


def train_xmcgan(arguments: list[str]) -> "Run":
    """Train XMC-GAN; a preset or the run to resume gives what the flags leave out."""
    from fastxm.training.trainer import train as loop
    from fastxm.training.xmcgan import XMCGANRecipe, XMCGANTraining

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Train XMC-GAN; flags override the preset, with --resume the run's configuration."""

        config: XMCGANTraining
        preset: str
        """A named configuration."""
        out: Path
        """The run's directory."""
        resume: bool = False
        """Go on from the last checkpoint in the run's directory."""

    values, preset, out, where = base(arguments)
    default = Arguments(configs.construct(XMCGANTraining, values, where), preset, out)
    flat = (tyro.conf.OmitArgPrefixes,)
    asked = parse(Arguments, "train xmcgan", arguments, default=default, config=flat)
    run = loop(XMCGANRecipe(asked.config), asked.out, asked.config.loop, resume=asked.resume)
    finish(run)
    return run


def base(arguments: list[str]) -> tuple[dict[str, Any], str, Path, str]:
    """The values that flags override: of the preset, or of the run to resume if none is named.

    Returns:
        the values, the preset's name, the run's directory, and where the values come from.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--preset", "--out", "--data"):
        first.add_argument(flag, nargs="?")
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(arguments)
    preset = known.preset or DEFAULT_PRESET
    values, where = configs.preset("xmcgan", preset), f"preset {preset}"
    data = known.data or values["data"]
    out = Path(known.out or f"runs/xmcgan-{Path(data).name}-{preset}")
    if known.resume and not known.preset:
        return configs.read(out / "config.yaml", "xmcgan"), preset, out, str(out / "config.yaml")
    return values, preset, out, where


def finish(run: "Run") -> None:
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
        say(f"go on with the same command and --resume --out {run.out}")


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


def sample(arguments: list[str]) -> None:
    """Draw pictures of captions into one PNG."""

    def run(
        captions: tyro.conf.Positional[list[str]],
        /,
        model: Path,
        out: Path = Path("grid.png"),
        num_images: int = 4,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        """Draw pictures of captions into one PNG, a row for each caption.

        Args:
            captions: what to draw.
            model: a run's directory, or a model's.
            out: the picture to write.
            num_images: pictures of each caption.
            seed: of the noise; the same seed gives the same pictures.
            device: auto, cpu or cuda.
        """
        from fastxm.training.logging import grid

        if not captions:
            raise ValueError("sample needs at least one caption")
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        images = load(model, device).generate(captions, num_images=num_images, seed=seed)
        columns = num_images if num_images > 1 else 8
        texts = [caption for caption in captions for _ in range(num_images)]
        out.parent.mkdir(parents=True, exist_ok=True)
        grid(images, texts, columns=columns).save(out, format="PNG")
        say(f"sample grid:  {out}")

    parse(run, "sample", arguments)


def load(path: Path, device: str) -> "XMCGAN":
    """The model of a run's or a model's directory, on a device.

    Raises:
        FileNotFoundError: there is none.
    """
    from fastxm import XMCGAN
    from fastxm.ops.memory import keep_freed_memory
    from fastxm.training.precision import pick_device

    on = pick_device(device)
    if on.type == "cpu":
        keep_freed_memory()
    return XMCGAN.from_pretrained(find_model(path)).to(on)


def find_model(path: Path) -> Path:
    """The model's own directory, from that or its run's.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"no model in {path}: give a finished run's directory, or a model's")


def evaluate(arguments: list[str]) -> None:
    """Measure a model: EffLite0-FD against pictures, and whether pictures find their captions."""

    def run(
        model: Path,
        data: str = "emoji",
        dual_encoder: Path | None = None,
        num_images: int = 1500,
        seed: int = 0,
        device: str = "auto",
        out: Path | None = None,
    ) -> None:
        """Measure a model: EffLite0-FD against pictures, and whether pictures find their captions.

        Args:
            model: a run's directory, or a model's.
            data: "emoji", or a folder of captioned pictures.
            dual_encoder: a run's or a model's directory; one is trained on the data if not given.
            num_images: pictures drawn for each distance, if the data has twice as many.
            seed: of what is chosen and of the noise.
            device: auto, cpu or cuda.
            out: where the figures go as JSON too, with what they were measured of and on.
        """
        from fastxm import DualEncoder, evaluation
        from fastxm.training.dual_encoder import DualEncoderTraining, cached_dual_encoder

        generator = load(model, device)
        if dual_encoder is not None:
            judge = DualEncoder.from_pretrained(find_model(dual_encoder))
        else:
            size = generator.config.image_size
            judge = cached_dual_encoder(DualEncoderTraining(data=data, image_size=size))
        judge = judge.to(generator.device)
        found = evaluation.evaluate(generator, judge, data, num_images=num_images, seed=seed)
        show(found)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            asked = {"data": data, "num_images": num_images, "seed": seed}
            report = {**found, "of": {"steps": steps(model), **asked}, "on": conditions(generator)}
            out.write_text(json.dumps(report, indent=1) + "\n")

    parse(run, "evaluate", arguments)


def steps(path: Path) -> int | None:
    """The step of the last checkpoint beside a run's model; None where there is none."""
    from fastxm.training import checkpoint

    kept = checkpoint.steps(find_model(path).parent / "checkpoints")
    return int(kept[-1].name.removeprefix(checkpoint.PREFIX)) if kept else None


def conditions(model: "XMCGAN") -> dict[str, Any]:
    """Where and with what a model was measured."""
    import torch

    from fastxm import doctor

    device = model.device
    return {
        "processor": doctor.processor(),
        "cores": doctor.available_cores(),
        "threads": torch.get_num_threads(),
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "fastxm": fastxm.__version__,
    }


def show(found: dict[str, dict[str, Any]]) -> None:
    """The two tables of what `evaluate` measured."""
    console = Console()
    heads = ("EffLite0-FD", "pictures", "of")
    distances = Table("", *(Column(head, justify="right") for head in heads))
    for name, row in found["distance"].items():
        counts = (f"{row[count]:,}" for count in ("pictures", "sources"))
        distances.add_row(name, f"{row['EffLite0-FD']:.1f}", *counts)
    console.print(distances)
    if not found["retrieval"]:
        return
    (of,) = {row["of"] for row in found["retrieval"].values()}
    recalls = [name for name in next(iter(found["retrieval"].values())) if name != "of"]
    columns = [Column(name, justify="right") for name in recalls]
    retrieval = Table(f"finds its caption among {of}", *columns)
    for name, row in found["retrieval"].items():
        retrieval.add_row(name, *(f"{row[recall]:.3f}" for recall in recalls))
    console.print(retrieval)


def bench(arguments: list[str]) -> int:
    """Time the ops, or one of them, against plain PyTorch."""
    folder = Path(fastxm.__file__).parent.parent / "benchmarks"
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not scripts:
        raise FileNotFoundError(f"no benchmarks in {folder}: they come with a checkout of fastxm")
    if arguments and arguments[0] in ("-h", "--help"):
        say("usage: fastxm bench [NAME] [flags of the script]", "", f"NAME: {', '.join(scripts)}")
        return 0
    chosen, rest = list(scripts.values()), arguments
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in scripts:
            raise ValueError(f"no benchmark {arguments[0]!r}: there are {', '.join(scripts)}")
        chosen, rest = [scripts[arguments[0]]], arguments[1:]
    codes = [subprocess.run([sys.executable, str(path), *rest], check=False).returncode
             for path in chosen]  # fmt: skip
    return max(codes)


def doctor(arguments: list[str]) -> None:
    """Say what was built, what the machine has, and what is missing."""
    from fastxm.doctor import report

    def run() -> None:
        """Say what was built, what the machine has, and what is missing."""
        report(Console())

    parse(run, "doctor", arguments)


def demo(arguments: list[str]) -> None:
    """Prepare emoji, train XMC-GAN on the CPU for a quarter of an hour, and draw."""

    def run(out: Path = Path("runs/demo"), minutes: float | None = None) -> None:
        """Prepare emoji, train XMC-GAN on the CPU for a quarter of an hour, and draw.

        Args:
            out: the run's directory; a demo that was stopped goes on there.
            minutes: of training, instead of the preset's.
        """
        prepare(["emoji"])
        flags = ["--preset", "cpu-demo", "--out", str(out)]
        if minutes is not None:
            flags += ["--max-minutes", str(minutes)]
        if (out / "config.yaml").exists():
            flags.append("--resume")
        train_xmcgan(flags)
        where = ["--model", str(out), "--out", str(out / "demo.png")]
        sample([*DEMO_CAPTIONS, "--num-images", "1", *where])

    parse(run, "demo", arguments)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "prepare": prepare,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "bench": bench,
    "doctor": doctor,
    "demo": demo,
}

if __name__ == "__main__":
    sys.exit(main())
