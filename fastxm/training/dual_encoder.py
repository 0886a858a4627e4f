"""The dual encoder's training: two heads on features that are computed once.

An epoch draws a caption for each picture. Pictures of one concept are not each other's negatives.
Concepts that no training picture shows are held out; on them recall is measured.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastxm.data import CaptionedImages, TextFeatures, open_dataset, resizing, text_features
from fastxm.data.cache import build_once, digest, track
from fastxm.data.image_features import image_features
from fastxm.data.leak_free import leak_free
from fastxm.data.subsets import principal
from fastxm.encoders.dual import DualEncoder, DualEncoderConfig
from fastxm.evaluation.metrics import retrieval_recall
from fastxm.ops import info_nce
from fastxm.training.ranks import Ranks, WholeDropout
from fastxm.training.recipe import Player


@dataclass(frozen=True)
class DualEncoderTraining:
    """Everything that decides a training of the dual encoder."""

    model: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    data: str = "emoji"
    """"emoji", or a folder or tar shards of captioned pictures."""
    image_size: int = 64
    """Side of the pictures before the image encoder resizes them: that of what it is to judge."""
    split: Literal["all", "styles", "concepts"] = "all"
    """Which pictures: all, or the encoder's share where a generator is to learn without captions,
    by styles or by styles and concepts (fastxm.data.leak_free)."""
    resize: Literal["crop", "stretch"] = "crop"
    """Of pictures in a folder or tars: cut the middle square, or keep all, out of proportion."""
    epochs: int = 32
    """Passes over the pictures."""
    batch_size: int = 512
    """Pairs in an update, of all processes together."""
    lr: float = 1e-3
    """AdamW's first step; it falls to 0 along a cosine."""
    weight_decay: float = 0.1
    """AdamW's, of matrices."""
    seed: int = 0
    """Of weights, order, captions and dropout."""

    def __post_init__(self) -> None:
        for name in ("image_size", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")


@dataclass(frozen=True)
class Pairs:
    """Features of pictures [N, image_width], of their captions, and their concepts [N]."""

    images: Tensor
    text: TextFeatures
    rows: np.ndarray  # [N], of the pictures among those that `text` knows
    captions: np.ndarray  # [N], how many each has
    labels: Tensor
    ids: list[str]

    @classmethod
    def of(cls, dataset: CaptionedImages, model: DualEncoder, progress: bool) -> "Pairs":
        """The features of a data set's principal pictures."""
        rows = principal(dataset)
        chosen = dataset.select(rows)
        _, labels = np.unique(np.array(chosen.groups), return_inverse=True)
        return cls(
            image_features(chosen, model.image_encoder, progress=progress),
            text_features(dataset, model.text_encoder, progress=progress),
            rows,
            np.array([len(captions) for captions in chosen.captions]),
            torch.from_numpy(labels),
            chosen.ids,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def sentences(self, index: Tensor, number: Tensor) -> Tensor:
        """Sentences [B, text_width] of caption `number` [B] of pictures `index` [B]."""
        rows = self.text.row(self.rows[index.numpy()], number.numpy())
        return self.text.batch(rows)["sentence"]


def train_dual_encoder(
    config: DualEncoderTraining | None = None, *, progress: bool = True, ranks: Ranks | None = None
) -> tuple[DualEncoder, dict[str, float]]:
    """Trains the heads on the CPU; some seconds, once the features are in the cache.

    Args:
        config: of the training.
        progress: show progress bars.
        ranks: of several processes that each call this, and take their rows of a batch.

    Returns:
        The model in eval mode, and what it reaches on held-out concepts ({} where there are none).
    """
    config = config or DualEncoderTraining()
    train, held_out = pairs_of(config, progress)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # the CUDA ones stay as they are
        model = DualEncoder(config.model)
        fit(model, Pairs.of(train, model, progress), config, progress, ranks or Ranks())
    if len(held_out) == 0:
        return model, {}
    return model, recall(model, Pairs.of(held_out, model, progress))


def pairs_of(
    config: DualEncoderTraining, progress: bool
) -> tuple[CaptionedImages, CaptionedImages]:
    """The pictures to train on, and those held out."""
    data, size = config.data, config.image_size
    options = {"progress": progress, **resizing(data, config.resize)}
    if config.split != "all":
        parts = leak_free(data, size, parted=config.split == "concepts", **options)
        return parts.encoder, parts.encoder_held_out
    train, held_out = (open_dataset(data, size, split, **options) for split in ("train", "val"))
    return train, held_out


def fit(
    model: DualEncoder,
    pairs: Pairs,
    config: DualEncoderTraining,
    progress: bool,
    ranks: Ranks,
) -> None:
    """Trains the heads on these pairs."""
    model.standardise(pairs.images)
    model.train()
    ranks.copy_first(list(model.state_dict().values()))
    optimizer = torch.optim.AdamW(groups(model, config.weight_decay), config.lr, fused=True)
    player, parameters = Player(model, optimizer), list(model.parameters())
    updates = config.epochs * -(-len(pairs) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    counts = torch.from_numpy(pairs.captions)
    epochs = range(config.epochs)
    for _ in track(epochs, config.epochs, "dual encoder", progress=progress):
        numbers = (torch.rand(len(pairs), dtype=torch.float64) * counts).long()
        for index in torch.randperm(len(pairs)).split(config.batch_size):
            own = ranks.own(index)
            with WholeDropout(ranks):
                embedded = model(pairs.images[own], pairs.sentences(own, numbers[own]))
            loss = info_nce(*embedded, labels=pairs.labels[own], group=ranks.group)
            if ranks.any(not loss.isfinite()):
                raise ValueError(f"the dual encoder's loss is {loss.item()}")
            player.take(ranks.average(torch.autograd.grad(loss, parameters)))
            optimizer.step()
            schedule.step()
    model.eval()


def groups(model: DualEncoder, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters as AdamW takes them: matrices decay, biases and the temperature do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


@torch.no_grad()
def recall(model: DualEncoder, pairs: Pairs) -> dict[str, float]:
    """Finding a picture's concept: one caption stands for each, the first of its first picture.

    Returns:
        R@1, R@5, R@10, and the numbers of pictures and of concepts.
    """
    concepts, first = np.unique(pairs.labels.numpy(), return_index=True)
    index = torch.from_numpy(first)
    keys = model.embed_text(pairs.sentences(index, torch.zeros_like(index)))
    truth = pairs.labels[:, None] == torch.from_numpy(concepts)
    found = retrieval_recall(model.embed_images(pairs.images), keys, truth)
    metrics = {f"R@{k}": value for k, value in found.items()}
    return {**metrics, "pictures": len(pairs), "concepts": len(concepts)}


def cached_dual_encoder(
    config: DualEncoderTraining | None = None, *, progress: bool = True
) -> DualEncoder:
    """The dual encoder of a data set, trained the first time and then read from the cache."""
    config = config or DualEncoderTraining()
    train, _ = pairs_of(config, progress)
    fields = {**dataclasses.asdict(config), "data": train.name}
    del fields["resize"]  # the pictures' directory is named by it
    made_of = {
        "format": 2,
        "pictures": train.cache_dir.name,
        "captions": digest([train.ids, train.captions]),
        "config": fields,
    }
    directory = train.cache_dir.parent / f"{train.name}-dual-encoder-{digest(made_of)}"
    build_once(directory, made_of, partial(write_model, config, progress))
    return DualEncoder.from_pretrained(directory)


def write_model(config: DualEncoderTraining, progress: bool, directory: Path) -> dict[str, Any]:
    model, metrics = train_dual_encoder(config, progress=progress)
    model.save_pretrained(directory)
    return {"held_out": metrics}
