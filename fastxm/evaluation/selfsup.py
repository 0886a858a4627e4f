"""What the self-supervised system reaches: its autoencoders, its maps, its captions.

Every figure stands beside what would be reached without learning: chance, another's picture, a
caption of another picture.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastxm.data import CaptionedImages, open_dataset
from fastxm.data.subsets import principal
from fastxm.data.vocabulary import split_words
from fastxm.encoders import EfficientNetLite0
from fastxm.evaluation.metrics import FeatureStatistics, frechet, retrieval_rank
from fastxm.evaluation.perceptual import perceptual_distance
from fastxm.evaluation.rouge import rouge_l
from fastxm.evaluation.text import bleu
from fastxm.models.codes import Codes, kernel_of
from fastxm.models.selfsup import CrossModalAutoencoder
from fastxm.models.text_autoencoder import text_loss
from fastxm.ops.mmd_two_sample import mmd_permutation_test

KS = (1, 5, 10)
Table = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """Pictures and captions that are judged: the principal ones of a split, at most so many."""

    name: str
    dataset: CaptionedImages
    images: Tensor

    @classmethod
    def of(cls, name: str, whole: CaptionedImages, count: int, seed: int) -> "Split":
        rows = principal(whole)
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
        dataset = whole.select(rows)
        return cls(name, dataset, dataset.batch(np.arange(len(dataset))))

    def captions(self) -> list[str]:
        """A caption of each picture, of all kinds in turn."""
        texts = self.dataset.captions
        return [captions[i % len(captions)] for i, captions in enumerate(texts)]

    def concepts(self) -> Tensor:
        """The first picture of each concept."""
        _, first = np.unique(np.array(self.dataset.groups), return_index=True)
        return torch.from_numpy(np.sort(first))


def evaluate_selfsup(
    run: Path,
    data: str = "emoji",
    *,
    num_images: int = 500,
    permutations: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    options: dict[str, Any] | None = None,
) -> dict[str, Table]:
    """Judges a run of `fastxm train selfsup`, or a model alone, on training and held-out data.

    Args:
        run: the run's directory, whose maps are all judged; or a model's.
        data: "emoji", or a folder or tar shards of captioned pictures.
        num_images: of each split, at most.
        permutations: of the test whether mapped codes are distributed as true ones.
        seed: of what is chosen and of noise.
        device: where it is computed.
        options: of `open_dataset`.

    Returns:
        tables by title, of rows by name, of figures by name.
    """
    models = {name: model.to(device) for name, model in find_maps(Path(run)).items()}
    model = next(iter(models.values()))
    splits = [
        Split.of(name, whole, num_images, seed)
        for name, part in {"training": "train", "held out": "val"}.items()
        if len(whole := open_dataset(data, model.image_size, part, **(options or {})))
    ]
    judge = EfficientNetLite0().to(device)
    found = {
        "pictures drawn again": {
            f"{split.name}{row}": figures
            for split in splits
            for row, figures in pictures(model, judge, split, seed).items()
        },
        "captions said again": {split.name: captions(model, split) for split in splits},
    }
    last = splits[-1]
    of = f"of {len(last.concepts())} {last.name} concepts"
    found["mapped codes"] = {
        row: figures
        for name, model in models.items()
        for row, figures in maps(Path(run), name, model, last, permutations, seed).items()
    }
    found[f"retrieval through the maps, {of}"] = {
        row: figures
        for name, model in models.items()
        for row, figures in retrieval(name, model, last).items()
    } | {"chance": chance(len(last.concepts()))}
    found[f"captions of {last.name} pictures"] = {
        name: told(model.caption(last.images), last.dataset.captions)
        for name, model in models.items()
    } | {"of another picture": told(last.captions()[::-1], last.dataset.captions)}
    return found


def find_maps(run: Path) -> dict[str, CrossModalAutoencoder]:
    """The models of all families of a run, by stage; or the model alone."""
    stages = sorted(folder.parent for folder in run.glob("mapping-*/model"))
    if not stages:
        folder = run / "model" if (run / "model").is_dir() else run
        return {"model": CrossModalAutoencoder.from_pretrained(folder)}
    read = CrossModalAutoencoder.from_pretrained
    return {stage.name.removeprefix("mapping-"): read(stage / "model") for stage in stages}


def pictures(
    model: CrossModalAutoencoder, judge: EfficientNetLite0, split: Split, seed: int
) -> Table:
    """EffLite0-FD, perceptual distance and squared error of reconstructions, and of others."""
    drawn = torch.cat([model.redraw(part, seed=seed) for part in split.images.split(64)])
    real = FeatureStatistics.of(judge.embed(split.images))
    others = split.images.roll(1, 0)
    found = {}
    for name, images in {"": drawn, ", another picture": others}.items():
        found[name] = {
            "perceptual": perceptual_distance(judge, images, split.images).mean().item(),
            "squared error": (images - split.images).square().mean().item(),
            "pictures": len(images),
        }
    found[""]["EffLite0-FD"] = frechet(FeatureStatistics.of(judge.embed(drawn)), real)
    return found


@torch.no_grad()
def captions(model: CrossModalAutoencoder, split: Split) -> dict[str, Any]:
    """Perplexity and accuracy of words, the decoder reading itself; whole captions; BLEU-4."""
    texts, total, right, count = split.captions(), 0.0, 0.0, 0
    for start in range(0, len(texts), 256):
        logits, truth = model.text(*model.text.tokens(texts[start : start + 256]))
        loss, accuracy = text_loss(logits, truth)
        total, right = total + loss.item() * len(truth), right + accuracy.item() * len(truth)
        count += len(truth)
    said, meant = [split_words(t) for t in model.reword(texts)], [split_words(t) for t in texts]
    return {
        "perplexity": math.exp(total / count),
        "words right": right / count,
        "whole captions right": sum(a == b for a, b in zip(said, meant)) / len(texts),
        "BLEU-4": bleu(said, [[m] for m in meant]),
        "captions": len(texts),
    }


@torch.no_grad()
def maps(
    run: Path, name: str, model: CrossModalAutoencoder, split: Split, permutations: int, seed: int
) -> Table:
    """MMD^2 of mapped and true codes: before and after training, and of a split, with p-value.

    Its floor is that of true codes and other true ones.
    """
    codes = Codes.of(split.dataset, model.image, model.text)
    every = torch.arange(len(codes.mean))
    source = torch.Generator().manual_seed(seed)
    texts = torch.randperm(len(codes.text), generator=source)[: len(every)].to(codes.text.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image = codes.image(every)
    text = codes.text[texts]
    pairs = {
        "to text": ("image_to_text", text, model.image_to_text(image)),
        "to images": ("text_to_image", image, model.text_to_image(text)),
    }
    measured = run / f"mapping-{name}" / "model" / "mmd2.json"
    known = json.loads(measured.read_text()) if measured.is_file() else None
    found: Table = {}
    for direction, (key, x, y) in pairs.items():
        figures = {}
        if known is not None:
            before, after, floor = (known[when][key] for when in ("before", "after", "floor"))
            fall = before / max(after, 1e-12)
            figures = {"before": before, "after": after, "fall": fall, "floor": floor}
        generator = torch.Generator(x.device).manual_seed(seed)
        statistic, p = mmd_permutation_test(x, y, kernel_of(x), permutations, generator=generator)
        figures |= {split.name: statistic.item(), "p-value": p.item()}
        found[f"{name} {direction}"] = figures
    return found


@torch.no_grad()
def retrieval(name: str, model: CrossModalAutoencoder, split: Split) -> Table:
    """Recall and median rank of the other side's code of a concept, by cosine about their mean."""
    first = split.concepts()
    image = model.image.embed(split.images[first])
    text = model.text.embed([split.captions()[i] for i in first])
    found = {}
    for direction, query, keys in (
        ("to text", model.image_to_text(image), text),
        ("to images", model.text_to_image(text), image),
    ):
        centre = keys.mean(0)
        rank = retrieval_rank(query - centre, keys - centre, torch.arange(len(keys)))
        recall = {f"R@{k}": (rank < k).double().mean().item() for k in KS}
        found[f"{name} {direction}"] = {**recall, "median rank": 1 + rank.median().item()}
    return found


def chance(count: int) -> dict[str, Any]:
    """Recall and median rank among so many of a guess."""
    return {**{f"R@{k}": min(k / count, 1.0) for k in KS}, "median rank": (count + 1) // 2}


def told(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """BLEU-1 to 4 and ROUGE-L of captions against all captions of their pictures."""
    said = [split_words(text) for text in texts]
    meant = [[split_words(r) for r in right_ones] for right_ones in references]
    scores = {f"BLEU-{n}": bleu(said, meant, n) for n in (1, 2, 3, 4)}
    return {**scores, "ROUGE-L": rouge_l(said, meant), "captions": len(said)}
