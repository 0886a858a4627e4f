"""The command line: prepare, train, sample, evaluate, bench, doctor, demo."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

import fastxm
from fastxm.cli.evaluation import evaluate, load
from fastxm.cli.flags import parse, say
from fastxm.cli.training import exit_code, train, train_system
from fastxm.training import config as configs

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
            data: "emoji", or a folder or tar shards of captioned pictures.
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

        if not captions or not all(caption.strip() for caption in captions):
            raise ValueError("sample needs at least one caption, and none that is empty")
        if out.suffix.lower() != ".png":
            raise ValueError(f"sample writes a PNG: name it so, not {out.name}")
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        images = load(model, device).generate(captions, num_images=num_images, seed=seed)
        columns = num_images if num_images > 1 else 8
        texts = [caption for caption in captions for _ in range(num_images)]
        out.parent.mkdir(parents=True, exist_ok=True)
        grid(images, texts, columns=columns).save(out, format="PNG")
        say(f"sample grid:  {out}")

    parse(run, "sample", arguments)


def bench(arguments: list[str]) -> int:
    """Time the ops, or those that are named, against plain PyTorch."""
    folder = Path(fastxm.__file__).parent.parent / "benchmarks"
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not scripts:
        raise FileNotFoundError(f"no benchmarks in {folder}: they come with a checkout of fastxm")
    if arguments and arguments[0] in ("-h", "--help"):
        say("usage: fastxm bench [NAME ...] [flags of the scripts]", "",
            f"NAME: {', '.join(scripts)}")  # fmt: skip
        return 0
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    if unknown := [name for name in names if name not in scripts]:
        raise ValueError(f"no benchmark {unknown[0]!r}: there are {', '.join(scripts)}")
    rest = arguments[len(names) :]
    codes = [subprocess.run([sys.executable, str(scripts[name]), *rest], check=False).returncode
             for name in names or scripts]  # fmt: skip
    return max(codes)


def doctor(arguments: list[str]) -> None:
    """Say what was built, what the machine has, and what is missing."""
    from fastxm.doctor import report

    def run() -> None:
        """Say what was built, what the machine has, and what is missing."""
        report(Console())

    parse(run, "doctor", arguments)


def demo(arguments: list[str]) -> int:
    """Prepare emoji, train XMC-GAN on the CPU for a quarter of an hour, and draw."""

    def run(out: Path = Path("runs/demo"), minutes: float | None = None) -> int:
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
        run = train_system("xmcgan", flags)
        if run.interrupted:
            return exit_code(run)
        blurred = configs.preset("xmcgan", "cpu-demo")["pixel_steps"]
        if run.step <= blurred:
            say(f"before step {blurred} pictures are blurs by design, and this machine took so few "
                "in the time: `fastxm demo --minutes 60` goes on")  # fmt: skip
        where = ["--model", str(out), "--out", str(out / "demo.png")]
        sample([*DEMO_CAPTIONS, "--num-images", "1", *where])
        return 0

    return parse(run, "demo", arguments)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "prepare": prepare,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "bench": bench,
    "doctor": doctor,
    "demo": demo,
}
