"""Training steps of MirrorGAN against a plain model: bench_mirrorgan.py --help

A step is what `fastxm train mirrorgan` does: the three discriminators, then the generator with the
redescription loss and DAMSM's word and sentence losses, and the moving average. The plain model
computes the word loss caption by caption, as AttnGAN does. "of limit" is the operations of fastxm's
own convolutions and products over the measured rate of a bfloat16 matrix product.
"""

import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import plain_mirrorgan
import torch
from bench_training import Bench
from bench_training import run as run_bench

import fastxm.training.mirrorgan as recipes
from fastxm import losses
from fastxm.encoders.damsm import DAMSM, DAMSMConfig
from fastxm.encoders.stem import STEMConfig
from fastxm.models.mirrorgan import GLAMConfig
from fastxm.models.stream import STREAM, STREAMConfig
from fastxm.training.mirrorgan import MirrorGANRecipe, MirrorGANTraining

SIZES = {
    "cpu": [{"S": 64, "gf": 24, "df": 24, "L": 64, "V": 3500, "B": 16}],
    "cuda": [{"S": 256, "gf": 32, "df": 64, "L": 224, "V": 5450, "B": 12}],
    "quick": [{"S": 64, "gf": 2, "df": 2, "L": 32, "V": 50, "B": 3}],
}
VARIANTS = {
    "plain": (True, {"precision": "fp32"}),
    "plain compiled": (True, {"precision": "bf16", "compile": True}),
    "fastxm fp32": (False, {"precision": "fp32"}),
    "fastxm bf16": (False, {"precision": "bf16"}),
    "fastxm compiled": (False, {"precision": "bf16", "compile": True}),
}


class RandomBatches:
    """The same batch of random pictures and numbered captions, for ever."""

    def __init__(self, config: MirrorGANTraining, vocabulary: int, device: torch.device):
        n, t = config.batch_size, 18
        lengths = torch.randint(2, t + 1, (n,))
        tokens = torch.randint(2, vocabulary, (n, t)) * (torch.arange(t) < lengths[:, None])
        size = config.model.image_size
        self.batch = {
            "image": torch.rand(n, 3, size, size),
            "tokens": tokens,
            "lengths": lengths,
            "index": torch.arange(n),
        }
        self.batch = {name: tensor.to(device) for name, tensor in self.batch.items()}
        self.dataset = types.SimpleNamespace(groups=[str(i) for i in range(n)])

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield self.batch


class Ours(MirrorGANRecipe):
    """The recipe as it is, on random data and stages that never trained."""

    shape: dict
    plain = False

    def build(self) -> None:
        words = tuple(f"word{i}" for i in range(self.shape["V"] - 2))
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            self.stages = Path(folder)
            size = self.shape["L"]
            damsm = DAMSMConfig(STEMConfig(words), image_encoder_size=size)
            DAMSM(damsm).save_pretrained(self.stages / "damsm")
            stream = STREAMConfig(words, image_encoder_size=size)
            STREAM(stream).save_pretrained(self.stages / "stream")
            super().build()
        if self.plain:
            plain_mirrorgan.plain(self.model)

    def open(self, image_size: int, features: object) -> RandomBatches:
        self.captions: list[str] = []
        return RandomBatches(self.config, self.shape["V"], self.device)

    def step(self, batch: dict) -> dict:
        if not self.plain:
            return super().step(batch)
        chosen = types.SimpleNamespace(
            bce=losses.bce, kl_normal=losses.kl_normal, damsm_loss=plain_mirrorgan.damsm_loss
        )
        with mock.patch.object(recipes, "losses", chosen):
            return super().step(batch)


def recipe_of(shape: dict, name: str, device: str) -> Ours:
    plain, options = VARIANTS[name]
    model = GLAMConfig(image_size=shape["S"], gf=shape["gf"], df=shape["df"])
    config = MirrorGANTraining(
        model=model,
        batch_size=shape["B"],
        stream_weight=20.0,
        damsm_weight=1.0,
        augment="translation",
        device=device,
        **options,
    )
    made = Ours(config)
    made.shape, made.plain = shape, plain
    return made


MIRROR = Bench("mirrorgan", SIZES, VARIANTS, recipe_of)


def run(argv: list[str] | None = None, bench: Bench = MIRROR) -> list[dict]:
    return run_bench(argv, bench)


if __name__ == "__main__":
    run()
