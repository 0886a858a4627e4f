"""`fastxm evaluate`, and the models that commands read."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from rich.console import Console
from rich.table import Column, Table

import fastxm
from fastxm.cli.flags import parse

if TYPE_CHECKING:
    from fastxm.models.text_to_image import TextToImage


MODELS = {
    "xmcgan": "XMCGAN",
    "mirrorgan": "MirrorGAN",
    "selfsup": "CrossModalAutoencoder",
    "lafite": "LAFITE",
    "vdl": "VDL",
}


def load(path: Path, device: str) -> "TextToImage":
    """The model of a run's or a model's directory, on a device.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of no kind that draws.
    """
    from fastxm.config import read_object
    from fastxm.models.pretrained import CONFIG, find_model
    from fastxm.ops.memory import keep_freed_memory
    from fastxm.training.precision import pick_device

    on = pick_device(device)
    if on.type == "cpu":
        keep_freed_memory()
    folder = find_model(path)
    kind = read_object(folder / CONFIG).get("model_type")
    if kind not in MODELS:
        raise ValueError(f"{folder} holds a {kind}, which draws nothing: give a run of {MODELS}")
    return getattr(fastxm, MODELS[kind]).from_pretrained(folder).to(on)


def evaluate(arguments: list[str]) -> None:
    """Measure a model: EffLite0-FD against pictures, and whether pictures find their captions."""

    def run(
        model: Path,
        data: str = "emoji",
        styles: tuple[str, ...] = (),
        resize: Literal["crop", "stretch"] | None = None,
        dual_encoder: Path | None = None,
        num_images: int = 1500,
        seed: int = 0,
        device: str = "auto",
        out: Path | None = None,
    ) -> None:
        """Measure a model: EffLite0-FD against pictures, and whether pictures find their captions.

        Of MirrorGAN also R-precision by its DAMSM, and what its captioner says of its pictures;
        of a self-supervised run its autoencoders, its maps and its captions.

        Args:
            model: a run's directory, or a model's.
            data: "emoji", or a folder or tar shards of captioned pictures.
            styles: of `emoji`, those that distance and retrieval are of: twemoji for LAFITE and
                VDL, which learn from no other; both if not given.
            resize: of a folder or tars, as of `fastxm train`; if not given as the model's run did,
                crop where there is none.
            dual_encoder: a run's or a model's directory; one is trained on the data if not given.
            num_images: pictures drawn for each distance, if the data has twice as many.
            seed: of what is chosen and of the noise.
            device: auto, cpu or cuda.
            out: where the figures go as JSON too, with what they were measured of and on.
        """
        from fastxm import DualEncoder, evaluation
        from fastxm.data import resizing
        from fastxm.models.pretrained import find_model
        from fastxm.training.dual_encoder import DualEncoderTraining, cached_dual_encoder

        if styles and data != "emoji":
            raise ValueError(f"styles are those of emoji, which {data} is not")
        if resize and data == "emoji":
            raise ValueError("resize is of pictures in a folder or tars: those of emoji are square")
        generator = load(model, device)
        square: dict[str, Any] = resizing(data, resize or resize_of(model))
        options = {"styles": styles} if styles else square
        if dual_encoder is not None:
            judge = DualEncoder.from_pretrained(find_model(dual_encoder))
        else:
            size = generator.image_size
            judge = cached_dual_encoder(DualEncoderTraining(data=data, image_size=size, **square))
        judge = judge.to(generator.device)
        found = evaluation.evaluate(
            generator, judge, data, num_images=num_images, seed=seed, options=options
        )
        show(found)
        told: dict[str, Any] = {}
        if isinstance(generator, fastxm.MirrorGAN):
            told = evaluation.evaluate_redescription(
                generator, data, num_images=num_images, seed=seed, options=square
            )
        elif isinstance(generator, fastxm.CrossModalAutoencoder):
            told = evaluation.evaluate_selfsup(
                model, data, seed=seed, device=generator.device, options=square
            )
        show_tables(told)
        found |= told
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            asked = {"data": data, **options, "num_images": num_images, "seed": seed}
            report = {**found, "of": {"steps": steps(model), **asked}, "on": conditions(generator)}
            out.write_text(json.dumps(report, indent=1) + "\n")

    parse(run, "evaluate", arguments)


def steps(path: Path) -> int | None:
    """The step of the last checkpoint beside a run's model; None where there is none."""
    from fastxm.models.pretrained import find_model
    from fastxm.training import checkpoint

    kept = checkpoint.steps(find_model(path).parent / "checkpoints")
    return int(kept[-1].name.removeprefix(checkpoint.PREFIX)) if kept else None


def resize_of(path: Path) -> str:
    """How the run of a model made pictures square: crop where there is no run, or none that says.

    Raises:
        ValueError: the run's config.yaml cannot be read.
    """
    from fastxm.models.pretrained import find_model

    config = find_model(path).parent / "config.yaml"
    try:
        values = yaml.safe_load(config.read_text()) if config.is_file() else {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{config} cannot be read: give --resize crop or stretch") from error
    return values.get("resize", "crop") if isinstance(values, dict) else "crop"


def conditions(model: "TextToImage") -> dict[str, Any]:
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


def show_tables(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Tables of figures: by title, by row, by column."""
    for title, rows in found.items():
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = Table(title, *(Column(name, justify="right") for name in names))
        for name, row in rows.items():
            table.add_row(name, *(written(row.get(column)) for column in names))
        Console().print(table)


def written(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
