"""Training steps of XMC-GAN, both players, against a plain model: bench_training.py --help

A step is what `fastxm train xmcgan` does: two updates of the discriminator and one of the
generator, with augmentation, all losses but that of the frozen image network, and the moving
average. "of limit" is the operations of fastxm's own convolutions and products over the measured
rate of a bfloat16 matrix product.
"""

import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from unittest import mock

import torch
from common import (
    clean,
    describe,
    environment,
    interleave,
    limit,
    output_folder,
    parse_shape,
    parser,
    speed,
    table,
    write,
)
from memory import peak_memory
from plain_model import nce, plain, region_word_loss
from torch.utils.flop_counter import FlopCounterMode

import fastxm.training.xmcgan as recipes
from fastxm import losses
from fastxm.models.xmcgan import XMCGANConfig
from fastxm.ops.memory import keep_freed_memory
from fastxm.training.recipe import Recipe
from fastxm.training.xmcgan import XMCGANRecipe, XMCGANTraining

SIZES = {
    "cpu": [{"S": 64, "gf": 16, "df": 24, "E": 384, "B": 16}],
    "cuda": [
        {"S": 64, "gf": 64, "df": 64, "E": 384, "B": 64},
        {"S": 256, "gf": 96, "df": 96, "E": 768, "B": 32},
    ],
    "quick": [{"S": 64, "gf": 1, "df": 1, "E": 8, "B": 2}],
}
STEPS = 2  # updates of the discriminator in a step, each of B pictures
COLUMNS = {"step ms": "step_ms:.1f", "images/s": "images_per_s:.1f", "peak MB": "peak_mb:.0f",
           "of limit": "of_limit:.1%", "vs plain": "speedup_over_plain:.2f",
           "vs plain compiled": "speedup_over_plain_compiled:.2f"}  # fmt: skip


class RandomBatches:
    """The same batch of random pictures and text features, for ever."""

    def __init__(self, config: XMCGANTraining, device: torch.device):
        model = config.model
        n, t = config.batch_size * config.d_steps_per_g, model.words
        words = torch.randn(n, t, model.text_width)
        self.batch = {
            "image": torch.rand(n, 3, model.image_size, model.image_size),
            "words": words,
            "sentence": words.mean(1),
            "lengths": torch.randint(2, t + 1, (n,)),
        }
        self.batch = {name: tensor.to(device) for name, tensor in self.batch.items()}
        self.batch["caption"] = [""] * n

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield self.batch


class Ours(XMCGANRecipe):
    """The recipe as it is, on random data."""

    def build(self) -> None:
        encoder = torch.nn.Module()  # of which the width alone is read
        encoder.width = self.config.model.text_width
        with mock.patch.object(recipes, "text_encoder", return_value=encoder):
            super().build()

    def open(self, image_size: int, features: object) -> RandomBatches:
        return RandomBatches(self.config, self.device)


class Plain(Ours):
    """The same system in plain PyTorch; its losses too are compiled where the networks are."""

    def build(self) -> None:
        self.losses = types.SimpleNamespace(
            hinge_d=losses.hinge_d,
            hinge_g=losses.hinge_g,
            nce=nce,
            region_word_loss=region_word_loss,
        )
        super().build()
        plain(self.model)

    def compile(self) -> None:
        super().compile()
        self.losses.nce = torch.compile(nce)
        self.losses.region_word_loss = torch.compile(region_word_loss)

    def step(self, batch: dict) -> dict:
        with mock.patch.object(recipes, "losses", self.losses):
            return super().step(batch)


VARIANTS: dict[str, tuple[type[Ours], dict]] = {
    "plain": (Plain, {"precision": "fp32"}),
    "plain compiled": (Plain, {"precision": "bf16", "compile": True}),
    "fastxm fp32": (Ours, {"precision": "fp32"}),
    "fastxm bf16": (Ours, {"precision": "bf16"}),
    "fastxm compiled": (Ours, {"precision": "bf16", "compile": True}),
}


def training(shape: dict, device: str, **options) -> XMCGANTraining:
    model = XMCGANConfig(
        image_size=shape["S"], gf=shape["gf"], df=shape["df"], text_width=shape["E"]
    )
    return XMCGANTraining(
        model=model,
        batch_size=shape["B"],
        augment="color,translation",
        pretrained_weight=0.0,
        device=device,
        **options,
    )


def recipe_of(shape: dict, name: str, device: str) -> XMCGANRecipe:
    kind, options = VARIANTS[name]
    return kind(training(shape, device, **options))


@dataclass(frozen=True)
class Bench:
    """What is timed: a system's variants at several shapes.

    Args:
        name: of the JSON that is written, and of the table.
        sizes: shapes by device.
        variants: their names; `recipe` makes one's recipe from a shape, its name and a device.
        pictures: of a step, for each of a batch.
    """

    name: str
    sizes: dict[str, list[dict]]
    variants: Iterable[str]
    recipe: Callable[[dict, str, str], Recipe]
    pictures: int = 1


XMC = Bench("training", SIZES, VARIANTS, recipe_of, STEPS)


def prepare(bench: Bench, shape: dict, name: str, args) -> tuple[Callable[[], dict], dict]:
    """A variant's step, warmed up, and what one look at it tells."""
    recipe = bench.recipe(shape, name, args.device)
    recipe.build()
    step = functools.partial(recipe.step, next(iter(recipe.batches)))
    facts = {"losses": {key: value.item() for key, value in step().items()}}
    step()
    facts["peak_mb"] = peak_memory(step, args.device)
    return step, facts


def operations(step: Callable[[], dict]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def measure(bench: Bench, shape: dict, args) -> list[dict]:
    """One row a variant; the first row is the machine's limit."""
    wanted = tuple(args.providers or [""])
    rows: dict[str, dict] = {}
    limiter, amount = limit("gemm", torch.bfloat16, args.device, args.quick)
    ready: dict[tuple[str, str], Callable] = {("limit", "gemm"): limiter}
    work = None
    for name in (name for name in bench.variants if name.startswith(wanted)):
        rows[name] = {"provider": name}
        try:
            step, facts = prepare(bench, shape, name, args)
            work = operations(step) if name == "fastxm fp32" else work
        except Exception as error:  # reported in the table; the others go on
            rows[name]["error"] = describe(error)
        else:
            rows[name] |= facts
            ready[name, "step"] = step
    times = interleave(ready, args, rows)
    rate = amount / median(times.pop(("limit", "gemm")))
    for (name, _), found in times.items():
        row, seconds = rows[name], median(found)
        row["step_ms"] = 1e3 * seconds
        row["images_per_s"] = bench.pictures * shape["B"] / seconds
        if work:
            row["of_limit"] = work / rate / seconds
    for row, other in itertools.product(rows.values(), ("plain", "plain compiled")):
        if "step_ms" in row and "step_ms" in rows.get(other, {}):
            ratio = rows[other]["step_ms"] / row["step_ms"]
            row[f"speedup_over_{other.replace(' ', '_')}"] = ratio
    head = {"provider": "limit", "bound": "gemm", "flops_per_s": rate, "step_flops": work}
    return [head, *rows.values()]


def run(argv: list[str] | None = None, bench: Bench = XMC) -> list[dict]:
    args = parser(f"Benchmark of steps of {bench.name}.").parse_args(argv)
    if args.quick:
        args.rounds, args.seconds = 1, 0.0
    usual = bench.sizes["quick" if args.quick else args.device]
    shapes = [parse_shape(s, usual[0]) for s in args.shapes] if args.shapes else usual
    env = environment(args.device)
    folder = output_folder(args, env)
    if args.device == "cpu":
        keep_freed_memory()  # as the trainer does; of use to all variants
    rows: list[dict] = []
    for shape in shapes:
        torch._dynamo.reset()
        found = measure(bench, shape, args)
        label = " ".join(f"{k}={v}" for k, v in shape.items())
        head = f"{env['chip']}, {env['threads']} threads, torch {env['torch']}, {env['commit']}"
        print(
            table(f"{bench.name} {label} ({head}; {speed(found[0])})", found, COLUMNS), flush=True
        )
        rows += [{**shape, **row} for row in found]
        if folder:
            write(folder / f"{bench.name}.json", {"op": bench.name, **env, "rows": clean(rows)})
    return rows


if __name__ == "__main__":
    run()
