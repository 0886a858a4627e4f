"""What a run leaves to be seen: a progress bar, metrics.jsonl, TensorBoard events, sample grids.

metrics.jsonl holds what training computed and nothing of the clock, so that a resumed run writes
the same file as one never stopped; speed goes to timing.jsonl, figures of held-out data to
held_out.jsonl.
"""

import json
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """The files and the bar of one run, taken up after `step`; later lines of a resumed run go.

    Args:
        out: the run's directory.
        step: the last completed step.
        console: where progress is shown; standard error if None.
    """

    def __init__(self, out: Path, step: int = 0, *, console: Console | None = None):
        self.out = out
        self.console = console or Console(stderr=True)
        truncate(out / "metrics.jsonl", step)
        truncate(out / "timing.jsonl", step)
        truncate(out / "held_out.jsonl", step)
        self.metrics_file = open(out / "metrics.jsonl", "a")  # noqa: SIM115
        self.timing_file = open(out / "timing.jsonl", "a")  # noqa: SIM115
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=1.0, step=step, text="")

    def __enter__(self) -> "RunLog":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
        self.metrics_file.close()
        self.timing_file.close()
        self.board.close()

    def advance(self, step: int, done: float) -> None:
        """Moves the bar: `done` is the part of the run that is behind, in [0, 1]."""
        self.bar.update(self.task, completed=done, step=step)

    def metrics(self, step: int, values: dict[str, float], speed: float, seconds: float) -> None:
        """Writes one line of metrics and one of timing.

        Args:
            step: the step just completed.
            values: means over the steps since the last line.
            speed: images a second, for the eye.
            seconds: training time so far.
        """
        print(json.dumps({"step": step, **values}), file=self.metrics_file, flush=True)
        timing = {"step": step, "images_per_second": round(speed, 2), "seconds": round(seconds, 2)}
        print(json.dumps(timing), file=self.timing_file, flush=True)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.add_scalar("images_per_second", speed, step)
        losses = " ".join(f"{k} {v:.3g}" for k, v in values.items() if k.startswith("loss"))
        text = f"{speed:.1f} images/s  {losses}"
        self.bar.update(self.task, text=text)
        if not self.console.is_terminal:
            self.console.print(f"step {step}  {seconds:.0f} s  {text}", soft_wrap=True)

    def held_out(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of figures of held-out data."""
        path = self.out / "held_out.jsonl"
        truncate(path, step - 1)  # a run taken up where it ended draws and judges again
        with open(path, "a") as file:
            print(json.dumps({"step": step, **values}), file=file)
        for name, value in values.items():
            self.board.add_scalar(f"held out/{name}", value, step)
        text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.console.print(f"step {step}  held out: {text}", soft_wrap=True)

    def samples(self, step: int, images: Tensor, captions: list[str]) -> Path:
        """Writes samples/<step>.png and returns its path."""
        path = self.out / "samples" / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        picture = grid(images, captions)
        draft = path.with_suffix(".tmp")
        picture.save(draft, format="PNG")
        os.replace(draft, path)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(picture.height, picture.width, 3)
        self.board.add_image("samples", pixels, step, dataformats="HWC")
        return path

    def sync(self) -> None:
        """Puts every line on the disk: called before a checkpoint that relies on them."""
        os.fsync(self.metrics_file.fileno())
        self.board.flush()


def truncate(path: Path, step: int) -> None:
    """Drops the lines of a .jsonl file that are later than `step`, and a last half line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(kept))
    os.replace(draft, path)


def grid(images: Tensor, captions: list[str], *, columns: int = 8, lines: int = 3) -> Image.Image:
    """One picture of many, each with its caption printed below.

    Args:
        images: [N, 3, H, W], in [0, 1]; small ones are enlarged to at least 128 pixels.
        captions: N texts, wrapped and cut to `lines` lines.
        columns: pictures in a row.
        lines: lines of text under a picture.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(captions) or not captions:
        raise ValueError(
            f"grid needs [N, 3, H, W] and N captions, not {images.shape}, {len(captions)}"
        )
    height, width = images.shape[-2:]
    scale = max(1, -(-128 // width))
    width, height, gap, leading = width * scale, height * scale, 8, 14
    columns = min(columns, len(captions))
    cell = (width + gap, height + gap + leading * lines)
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (cell[0] * columns + gap, cell[1] * rows + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    bytes_ = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    for i, (pixels, caption) in enumerate(zip(bytes_.permute(0, 2, 3, 1), captions)):
        x, y = gap + i % columns * cell[0], gap + i // columns * cell[1]
        picture = Image.fromarray(pixels.contiguous().numpy()).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        sheet.paste(picture, (x, y))
        text = "\n".join(wrap(caption, width, font)[:lines])
        draw.multiline_text((x, y + height + 1), text, fill="black", font=font, spacing=2)
    return sheet


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Breaks text into lines at most `width` pixels wide; a longer word is cut."""
    lines = [""]
    for word in text[:1000].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    for i, line in enumerate(lines):
        while len(line) > 1 and font.getlength(line) > width:
            line = line[:-1]
        lines[i] = line
    return lines
