"""LAFITE and VDL side by side: one data split, one budget, one seed; a table and its JSON.

    python benchmarks/vdl_table.py --out runs/vdl-table [--steps 2600] [--only vdl-gaussian ...]

Each row is a run of the preset cpu-demo in a directory of its own, taken up where it was stopped.
EffLite0-FD is of pictures drawn of held-out captions, from training pictures of the generator's
style; R@10 of finding their caption among 100, by a dual encoder that has seen both styles and
guided nothing; the cosine is of sampled text embeddings and true ones of held-out pictures.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fastxm import evaluation
from fastxm.data.leak_free import STYLES
from fastxm.models.pretrained import find_model
from fastxm.training import config as configs
from fastxm.training.dual_encoder import DualEncoderTraining, cached_dual_encoder
from fastxm.training.lafite import LAFITERecipe, LAFITETraining
from fastxm.training.trainer import train
from fastxm.training.vdl import VDLRecipe, VDLTraining

PRESET = "cpu-demo"


@dataclass(frozen=True)
class Variant:
    """A row: a system, and what its training and its model have instead of the preset's."""

    system: str
    training: dict[str, Any]
    model: dict[str, Any]


VARIANTS = {
    "lafite-fixed": Variant("lafite", {}, {}),
    "lafite-trained": Variant("lafite", {"perturbation_steps": 500}, {"perturbation": "trained"}),
    "vdl-gaussian": Variant("vdl", {}, {}),
    "vdl-vmf": Variant("vdl", {}, {"family": "vmf"}),
    "vdl-without-evidence": Variant("vdl", {}, {"evidence": "none"}),
    "vdl-1-percent": Variant("vdl", {"label_fraction": 0.01}, {}),
    "vdl-10-percent": Variant("vdl", {"label_fraction": 0.1}, {}),
    "vdl-50-percent": Variant("vdl", {"label_fraction": 0.5}, {}),
    "supervised": Variant("lafite", {"label_fraction": 1.0}, {}),
}


def recipe(variant: Variant, **budget: Any) -> Any:
    """The variant's recipe; what `budget` gives is of the training, but for steps of its loop."""
    made, training = {"lafite": (LAFITERecipe, LAFITETraining), "vdl": (VDLRecipe, VDLTraining)}[
        variant.system
    ]
    values = configs.preset(variant.system, PRESET)
    config: Any = configs.construct(training, values, PRESET)
    known = {field.name for field in fields(training)}
    asked = {name: value for name, value in budget.items() if name in known}
    loop = replace(config.loop, max_minutes=None, **budget.get("of_loop", {}))
    model = replace(config.model, **variant.model)
    return made(replace(config, model=model, loop=loop, **variant.training, **asked))


def row(name: str, out: Path, num_images: int, budget: dict[str, Any]) -> dict[str, Any]:
    """Trains a variant, or what is left of it, and measures it."""
    made = recipe(VARIANTS[name], **budget)
    run = train(made, out / name, made.config.loop, resume=True)
    if run.interrupted:
        raise SystemExit(f"{name} was interrupted: the same command goes on")
    model = made.model_class.from_pretrained(find_model(run.out)).to(made.device)
    size = model.config.image_size
    judge = cached_dual_encoder(DualEncoderTraining(data=made.config.data, image_size=size))
    styled = {"styles": (STYLES["generator"],)} if made.config.data == "emoji" else {}
    judge = judge.to(made.device)
    options = {"num_images": num_images, "seed": made.config.seed, "options": styled}
    found = evaluation.evaluate(model, judge, made.config.data, **options)
    near = made.held_out()
    return {
        "EffLite0-FD": found["distance"]["held-out captions"]["EffLite0-FD"],
        "R@10": found["retrieval"]["generated"]["R@10"],
        "cos(sampled, true)": near.get("cos_sampled", near["cos_prior"]),
        "cos(image, true)": near["cos_image"],
        "KL": near.get("kl", 0.0),
        "steps": run.step,
        "evaluation": found,
        "diagnostics": near,
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    names = ("EffLite0-FD", "R@10", "cos(sampled, true)", "cos(image, true)", "KL", "steps")
    columns = (Column(name, justify="right") for name in names)
    table = Table(Column("", no_wrap=True, min_width=max(map(len, VARIANTS))), *columns)
    for name, found in rows.items():
        table.add_row(name, *(f"{found[column]:.4g}" for column in names))
    Console().print(table)


def budgets(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What the flags say of the budget: three fifths of the steps for stage 1, a fifth for 2a."""
    if arguments.steps:
        yield "of_loop", {"steps": arguments.steps}
        yield "adversarial_steps", max(1, arguments.steps * 3 // 5)
        yield "posterior_steps", max(1, arguments.steps // 5)
    if arguments.data:
        yield "data", arguments.data
    if arguments.device:
        yield "device", arguments.device


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/vdl-table"))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="of every run, instead of the preset's")
    parser.add_argument("--data", help="instead of the preset's")
    parser.add_argument("--device", help="instead of auto")
    parser.add_argument("--num-images", type=int, default=1500)
    arguments = parser.parse_args()
    rows = {}
    for name in arguments.only:
        rows[name] = row(name, arguments.out, arguments.num_images, dict(budgets(arguments)))
        (arguments.out / f"{name}.json").write_text(json.dumps(rows[name], indent=1) + "\n")
        show(rows)


if __name__ == "__main__":
    main()
