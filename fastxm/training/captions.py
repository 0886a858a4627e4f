"""What the recipes that learn from pictures and their numbered captions share.

The picture half stands on a frozen network. Its features are computed once and kept in the cache,
unless pictures are mirrored or there are too many of them.
"""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastxm.data import CaptionedImages, open_dataset, resizing
from fastxm.data.image_features import image_features
from fastxm.data.subsets import principal
from fastxm.data.vocabulary import UNKNOWN, Tokens, Vocabulary
from fastxm.nn import synchronise
from fastxm.training.batches import Batch, CaptionedBatches
from fastxm.training.precision import pick_device, seed_all
from fastxm.training.ranks import WholeDropout
from fastxm.training.recipe import Player, Recipe
from fastxm.training.trainer import LoopConfig


@dataclass(frozen=True, kw_only=True)
class CaptionTraining:
    """What decides a training on pictures and captions, but for the model."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    data: str = "emoji"
    """"emoji", or a folder or tar shards of captioned pictures."""
    image_size: int = 256
    """Side of the pictures, before the image encoder resizes them."""
    resize: Literal["crop", "stretch"] = "crop"
    """Of pictures in a folder or tars: cut the middle square, or keep all, out of proportion."""
    batch_size: int = 48
    """Pairs in an update, of all processes together."""
    lr: float = 2e-3
    """Adam's first step."""
    lr_decay: float = 1.0
    """Its factor after each pass over as many pictures as there are."""
    lr_min: float = 0.0
    """Where that ends."""
    beta1: float = 0.9
    """Adam's decay of the mean."""
    weight_decay: float = 0.0
    """AdamW's, of all weights."""
    min_count: int = 1
    """How often a word comes in the captions, at least, to be in the vocabulary."""
    unknown: float = 0.0
    """Share of the words that training hides, so that it meets words it does not know."""
    flip: bool = False
    """Mirror half of the pictures."""
    cache: bool = True
    """Compute the frozen network's features once; not with flip."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of weights, dropout and the order of the data."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if not 0 <= self.unknown < 1:
            raise ValueError(f"unknown is a share in [0, 1), not {self.unknown}")
        if self.cache and self.flip:
            raise ValueError("features of pictures that are mirrored are not cached: --no-cache")


class CaptionRecipe(Recipe):
    """One network, its optimiser, and batches of pictures with numbered captions.

    Args:
        config: of the training.
    """

    model: Any  # of `make`
    batches: CaptionedBatches
    unbound = ("loop", "device")
    later = (("resize", "crop"),)

    def __init__(self, config: Any):
        self.config = config
        self.images_per_step = config.batch_size
        self.device = pick_device(config.device)

    @abstractmethod
    def make(self, vocabulary: tuple[str, ...]) -> nn.Module:
        """The model, with these words unless its configuration names others."""

    @abstractmethod
    def eye(self) -> Any:
        """What the features of pictures come from: `name`, `width`, `embed`; frozen."""

    @abstractmethod
    def losses(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        """ "loss" and its parts, of features [B, width] of the pictures of this process."""

    def build(self) -> None:
        config = self.config
        self.ranks.check(config.batch_size)
        seed_all(config.seed, self.device)
        options = resizing(config.data, config.resize)
        train, self.held = (
            open_dataset(config.data, config.image_size, part, **options)
            for part in ("train", "val")
        )
        texts = (caption for captions in train.captions for caption in captions)
        vocabulary = Vocabulary.of(texts, config.min_count)
        self.model = self.make(vocabulary.words).train().to(self.device)
        synchronise(self.model, self.ranks.group, config.batch_size)
        self.labels = concepts(train).to(self.device)
        self.batches = CaptionedBatches(
            train,
            self.tokens(train),
            config.batch_size,
            seed=config.seed,
            flip=config.flip,
            device=self.device,
            ranks=self.ranks,
        )
        self.epoch = len(train) / config.batch_size
        self.sight = self.eye()
        self.table = image_features(train, self.sight).to(self.device) if config.cache else None
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            config.lr,
            (config.beta1, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.players = {self.system: Player(self.model, optimizer)}

    def tokens(self, dataset: CaptionedImages) -> Tokens:
        words = getattr(self.model.config, "stem", self.model.config).words
        return Tokens(dataset, self.vocabulary, words)

    @property
    def vocabulary(self) -> Vocabulary:
        return getattr(self.model, "stem", self.model).vocabulary

    def step(self, batch: Batch) -> dict[str, Tensor]:
        config, player = self.config, self.players[self.system]
        optimizer = player.optimizer
        passed = int(self.batches.position["batches"] / self.epoch)
        for group in optimizer.param_groups:
            group["lr"] = max(config.lr * config.lr_decay**passed, config.lr_min)
        if config.unknown:
            drawn = torch.rand(config.batch_size, batch["tokens"].shape[1], device=self.device)
            drawn = self.ranks.own(drawn)
            hidden = hide(batch["tokens"], batch["lengths"], config.unknown, drawn=drawn)
            batch = {**batch, "hidden": hidden}
        with WholeDropout(self.ranks):
            found = self.losses(self.features(batch), batch)
        parameters = list(self.model.parameters())
        player.take(self.ranks.average(torch.autograd.grad(found["loss"], parameters)))
        self.clip()
        optimizer.step()
        optimizer.zero_grad()
        return {name: value.detach() for name, value in found.items()}

    def clip(self) -> None:
        """Bounds gradients before they are applied; by default it does not."""

    def features(self, batch: Batch) -> Tensor:
        if self.table is None:
            with torch.no_grad():
                return self.sight.embed(batch["image"])
        return self.table[batch["index"]]

    def export(self, directory: Path) -> None:
        self.model.save_pretrained(directory)


def concepts(dataset: CaptionedImages) -> Tensor:
    """The number of each picture's concept [N]: pictures of one are no negatives."""
    _, labels = np.unique(np.array(dataset.groups), return_inverse=True)
    return torch.from_numpy(labels)


def chosen(dataset: CaptionedImages) -> CaptionedImages:
    """The pictures that stand for a data set, of `emoji` no skin tones."""
    return dataset.select(principal(dataset))


def hide(tokens: Tensor, lengths: Tensor, share: float, *, drawn: Tensor | None = None) -> Tensor:
    """Numbered words of which a random share is unknown, so that training meets such words.

    Args:
        tokens: [B, T], padding after each text's length.
        lengths: [B].
        share: in [0, 1].
        drawn: [B, T], uniform in [0, 1): those below share are hidden. Drawn if not given.
    """
    there = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    drawn = torch.rand(tokens.shape, device=tokens.device) if drawn is None else drawn
    return torch.where((drawn < share) & there, UNKNOWN, tokens)


def with_words(config: Any, vocabulary: tuple[str, ...]) -> Any:
    """A model's configuration with these words, unless it has its own."""
    return config if config.vocabulary else replace(config, vocabulary=vocabulary)
