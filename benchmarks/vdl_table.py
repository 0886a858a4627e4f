"""LAFITE and VDL side by side: one data split, one budget, one seed; a table and its JSON.

    python benchmarks/vdl_table.py --out runs/vdl-table [--steps 1500] [--only vdl-gaussian ...]

Each row is a run of the preset in a directory of its own; rows that are done are read, and
a run that was stopped goes on. All rows have as many steps of an adversary. Of VDL without captions
three fifths of them are stage 1, the rest 2b, and 2a's come on top; these rows share stage 1,
without a corpus or with one: `stage-1-...` is a run, with which LAFITE goes on. With captions the
posterior learns of them first, on top too. The corpus is the captions that the joint encoder was
trained on, or `--corpus FILE`.

EffLite0-FD is of pictures drawn of held-out captions, from training pictures of the generator's
style; R@10 of finding their caption among 100, by a dual encoder that has seen both styles and
guided nothing; the cosine is of sampled text embeddings and true ones of held-out pictures.
Beside a row's figures lies `ROW.png`, drawn of the same captions in each, half of them held out.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fastxm.data import open_dataset
from fastxm.data.leak_free import STYLES
from fastxm.evaluation.evaluator import Evaluation, FrechetJudge
from fastxm.models.pretrained import find_model
from fastxm.training import checkpoint
from fastxm.training import config as configs
from fastxm.training.dual_encoder import DualEncoderTraining, cached_dual_encoder
from fastxm.training.lafite import LAFITERecipe, LAFITETraining
from fastxm.training.logging import grid
from fastxm.training.trainer import Run, train
from fastxm.training.vdl import VDLRecipe, VDLTraining

REPLACED = ("data", "device", "precision")  # of the preset's
CLASSES: dict[str, tuple[Any, Any]] = {
    "lafite": (LAFITERecipe, LAFITETraining),
    "vdl": (VDLRecipe, VDLTraining),
}


@dataclass(frozen=True)
class Variant:
    """A row: a system, and what its training and its model have instead of the preset's.

    begins: the row of LAFITE whose stage 1 is its own too. corpus: it has the budget's.
    more: steps on top of the budget, which have no adversary.
    """

    system: str
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    begins: str = ""
    corpus: bool = False
    more: int = 0


ALONE = 100  # steps of 2a where no captions teach


def unaided(begins: str, **model: Any) -> Variant:
    """VDL without captions, from stage 1 of a row of LAFITE."""
    corpus = begins == "lafite-corpus"
    stages = {"posterior_steps": ALONE}
    return Variant("vdl", stages, model, begins=begins, corpus=corpus, more=ALONE)


def of_captions(fraction: float) -> Variant:
    """VDL whose posterior learns of captions alone, before the networks do; nothing is drawn."""
    posterior = {"adversarial_steps": 0, "posterior_steps": 200}
    weights = {"reconstruction_weight": 0.0, "alignment_weight": 0.0}
    return Variant("vdl", {"label_fraction": fraction, **posterior, **weights}, more=200)


VARIANTS = {
    "lafite-fixed": Variant("lafite", begins="lafite-fixed"),
    # its perturbation draws no picture: such a step takes no time
    "lafite-trained": Variant(
        "lafite", {"perturbation_steps": 500}, {"perturbation": "trained"}, more=500
    ),
    "lafite-corpus": Variant("lafite", begins="lafite-corpus", corpus=True),
    "vdl-gaussian": unaided("lafite-fixed"),
    "vdl-vmf": unaided("lafite-fixed", family="vmf"),
    "vdl-without-evidence": unaided("lafite-fixed", evidence="none"),
    "vdl-corpus": unaided("lafite-corpus"),
    "vdl-1-percent": of_captions(0.01),
    "vdl-10-percent": of_captions(0.1),
    "vdl-50-percent": of_captions(0.5),
    "supervised": Variant("lafite", {"label_fraction": 1.0}),
}


@dataclass(frozen=True)
class Budget:
    """What all rows share: steps of a run, and what is not the preset's."""

    out: Path
    steps: int
    num_images: int
    corpus: str
    training: dict[str, Any]
    preset: str

    @property
    def stage1(self) -> int:
        """Steps of stage 1."""
        return max(1, self.steps * 3 // 5)


def recipe(variant: Variant, budget: Budget) -> Any:
    """The variant's recipe, whose loop ends when the budget does."""
    made, training = CLASSES[variant.system]
    values = configs.preset(variant.system, budget.preset)
    config: Any = configs.construct(training, values, budget.preset)
    asked = {**budget.training, **variant.training, "corpus": budget.corpus * variant.corpus}
    steps = budget.steps + variant.more
    if variant.system == "vdl":
        asked = {"adversarial_steps": budget.stage1, **asked}
        if variant.begins:
            asked["stage1"] = str(first_stage(variant.begins, budget))
    loop = replace(config.loop, max_minutes=None, steps=steps)
    return made(replace(config, model=replace(config.model, **variant.model), loop=loop, **asked))


def trained(name: str, budget: Budget) -> tuple[Any, Run]:
    """A variant's recipe and its run, or what was left of it."""
    variant, out = VARIANTS[name], budget.out / name
    if variant.begins == name and not out.exists():
        draft = budget.out / f".{name}"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(first_stage(name, budget), draft).rename(out)
    made = recipe(variant, budget)
    return made, finished(train(made, out, made.config.loop, resume=True))


def first_stage(name: str, budget: Budget) -> Path:
    """A run of a row of LAFITE for as long as VDL's stage 1, made if it is not there."""
    out = budget.out / f"stage-1-{name}"
    done = [path.name for path in checkpoint.steps(out / "checkpoints")]
    if f"{checkpoint.PREFIX}{budget.stage1:08d}" not in done:
        made = recipe(VARIANTS[name], budget)
        finished(train(made, out, replace(made.config.loop, steps=budget.stage1), resume=True))
    return out


def finished(run: Run) -> Run:
    if run.interrupted:
        raise SystemExit(f"{run.out.name} was interrupted: the same command goes on")
    return run


@cache
def judges(data: str, size: int, num_images: int, seed: int) -> tuple[Any, FrechetJudge, Any]:
    """The dual encoder, the judge of distances and the held-out pictures."""
    dual = cached_dual_encoder(DualEncoderTraining(data=data, image_size=size))
    options = {"styles": (STYLES["generator"],)} if data == "emoji" else {}
    pictures, held_out = (open_dataset(data, size, split, **options) for split in ("train", "val"))
    judge = FrechetJudge(pictures, dual.image_encoder, num_images=num_images, seed=seed)
    return dual, judge, held_out


def judged(model: Any, config: Any, num_images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distances and retrieval of what a model draws of held-out captions."""
    seed = config.seed
    dual, judge, held_out = judges(config.data, model.config.image_size, num_images, seed)
    evaluation = Evaluation(model, dual.to(model.device), judge, pool=100, seed=seed, progress=True)
    return evaluation.on_held_out(held_out)


def row(name: str, budget: Budget) -> dict[str, Any]:
    """Trains a variant, or what is left of it, and measures it."""
    made, run = trained(name, budget)
    model = made.model_class.from_pretrained(find_model(run.out)).to(made.device)
    distance, retrieval = judged(model, made.config, budget.num_images)
    near = made.held_out()
    drawn = model.generate(made.captions[::4], seed=made.config.seed)
    grid(drawn, made.captions[::4]).save(budget.out / f"{name}.png")
    return {
        "EffLite0-FD": distance["held-out captions"]["EffLite0-FD"],
        "R@10": retrieval["generated"]["R@10"],
        "cos(sampled, true)": near.get("cos_sampled", near["cos_prior"]),
        "cos(image, true)": near["cos_image"],
        "KL": near.get("kl", 0.0),
        "steps": budget.steps,
        "distance": distance,
        "retrieval": retrieval,
        "diagnostics": near,
    }


def kept(name: str, budget: Budget) -> dict[str, Any]:
    """A variant's row: of its file if it is of this budget, or made and written there."""
    file = budget.out / f"{name}.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        if found["steps"] == budget.steps:
            return found
    found = row(name, budget)
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(found, indent=1) + "\n")
    draft.replace(file)
    return found


def show(rows: dict[str, dict[str, Any]]) -> None:
    names = ("EffLite0-FD", "R@10", "cos(sampled, true)", "cos(image, true)", "KL", "steps")
    columns = (Column(name, justify="right") for name in names)
    table = Table(Column("", no_wrap=True, min_width=max(map(len, VARIANTS))), *columns)
    for name, found in rows.items():
        table.add_row(name, *(f"{found[column]:.4g}" for column in names))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/vdl-table"))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1500, help="of every run")
    parser.add_argument("--data", help="instead of the preset's")
    parser.add_argument("--preset", default="cpu-demo")
    parser.add_argument("--device", help="instead of auto")
    precisions = ("auto", "bf16", "fp32")
    parser.add_argument("--precision", choices=precisions, help="instead of the preset's")
    parser.add_argument("--corpus", default="encoder", help="a file of texts, one a line")
    parser.add_argument("--num-images", type=int, default=1500)
    asked = parser.parse_args(arguments)
    training = {name: value for name in REPLACED if (value := getattr(asked, name))}
    budget = Budget(asked.out, asked.steps, asked.num_images, asked.corpus, training, asked.preset)
    rows = {}
    for name in asked.only:
        rows[name] = kept(name, budget)
        show(rows)


if __name__ == "__main__":
    main()
