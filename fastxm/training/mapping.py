"""The maps' training: both directions of a family side by side, between frozen codes.

Codes of pictures and of captions are drawn apart, each from its own table by its own generator:
no pair enters a loss. With an anchor, a given number of pairs does.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from fastxm.data import open_dataset
from fastxm.data.cache import file_digest
from fastxm.data.subsets import principal
from fastxm.models.codes import Codes, kernel_of
from fastxm.models.image_autoencoder import ImageAutoencoder
from fastxm.models.selfsup import CodeMap, CrossModalAutoencoder, CrossModalConfig, Family
from fastxm.models.text_autoencoder import TextAutoencoder
from fastxm.ops import info_nce, mmd2
from fastxm.ops.mmd import RBF
from fastxm.training.batches import place
from fastxm.training.draws import Draws
from fastxm.training.ema import EMA
from fastxm.training.mappers import MAPPERS, Mapper, MMDGANConfig
from fastxm.training.precision import pick_device, seed_all
from fastxm.training.recipe import Recipe, Samples, State
from fastxm.training.trainer import LoopConfig

MEASURED = 1024  # codes of each side that MMD is measured of
ANCHOR_SHARPNESS = 10.0  # factor of the cosines of the InfoNCE anchor


@dataclass(frozen=True)
class MappingTraining:
    """What decides a training of the maps."""

    families: tuple[Family, ...] = ("mmd_gan",)
    """"mmd_gan", "gan" (a WGAN to images) and "mmd", each a stage; the first is the model's."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    batch_size: int = 64
    """Codes of each side in an update."""
    lr_scale: float = 1.0
    """Factor of the published step sizes."""
    hidden: int = 512
    """Width of the maps' hidden layers."""
    ema_decay: float = 0.0
    """Decay of the moving average of the maps that is kept; 0 keeps the last (released)."""
    gan_critic: Literal["free", "spectral"] = "free"
    """Layers of the critic of the GAN to text: as they are (released), or divided by their largest
    singular value."""
    mmd_gan: MMDGANConfig = field(default_factory=MMDGANConfig)
    """What this family has of its own."""
    bandwidths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """Of the kernel, a sum of Gaussians."""
    stochastic: bool = True
    """Draw a picture's code from its Gaussian; else its mean stands for it."""
    standardise: bool = True
    """Maps and critics see all codes less their mean, over their spread: those that
    differ little from one another are else all mapped to about the same. Released: as they are."""
    anchor: Literal["none", "l2", "info_nce"] = "none"
    """What draws the codes of given pairs together."""
    anchor_pairs: int = 200
    """How many pairs are given."""
    anchor_weight: float = 1.0
    """Weight of the anchor in each update of a map."""

    def __post_init__(self) -> None:
        if not self.families or set(self.families) - set(MAPPERS):
            raise ValueError(f"families are some of {', '.join(MAPPERS)}, not {self.families}")
        if len(set(self.families)) < len(self.families):
            raise ValueError(f"families come once each, not {self.families}")
        for name, least in {"batch_size": 2, "anchor_pairs": 2, "hidden": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.lr_scale > 0:
            raise ValueError(f"lr_scale must be above 0, not {self.lr_scale}")
        if self.gan_critic not in ("free", "spectral"):
            raise ValueError(f"gan_critic is free or spectral, not {self.gan_critic!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is in [0, 1), not {self.ema_decay}")
        if not self.bandwidths or not all(width > 0 for width in self.bandwidths):
            raise ValueError(f"bandwidths are above 0, not {self.bandwidths}")
        if self.anchor not in ("none", "l2", "info_nce"):
            raise ValueError(f"anchor is none, l2 or info_nce, not {self.anchor!r}")
        if not self.anchor_weight >= 0:
            raise ValueError(f"anchor_weight must be at least 0, not {self.anchor_weight}")

    def stage(self, family: str) -> str:
        """The name of the directory of a family's stage."""
        anchored = "" if self.anchor == "none" else f"-{self.anchor}-{self.anchor_pairs}"
        return f"mapping-{family}{anchored}"


def identity(codes: Tensor) -> Tensor:
    return codes


class CodeDraws:
    """Batches of codes of pictures and, apart from them, of captions; a step takes what it needs.

    Args:
        codes: what is drawn.
        batch_size: B.
        stochastic: draw a picture's code from its Gaussian, by the global generator.
        seed: of the two generators.
        see_image, see_text: what becomes of them, functions of codes [B, D] and [B, E].
    """

    def __init__(
        self,
        codes: Codes,
        batch_size: int,
        *,
        stochastic: bool = True,
        seed: int = 0,
        see_image: Callable[[Tensor], Tensor] = identity,
        see_text: Callable[[Tensor], Tensor] = identity,
    ):
        self.codes, self.stochastic = codes, stochastic
        self.see_image, self.see_text = see_image, see_text
        self.images = Draws(codes.image_weight, batch_size, seed=2 * seed)
        self.texts = Draws(codes.text_weight, batch_size, seed=2 * seed + 1)

    def image(self) -> Tensor:
        """The next codes of pictures, [B, D]."""
        rows = place(next(self.images), self.codes.mean.device)
        return self.see_image(self.codes.image(rows) if self.stochastic else self.codes.mean[rows])

    def text(self) -> Tensor:
        """The next codes of captions, [B, E]."""
        rows = place(next(self.texts), self.codes.text.device)
        return self.see_text(self.codes.text[rows])

    def __iter__(self) -> Iterator[Self]:
        while True:
            yield self

    def state_dict(self) -> State:
        return {"images": self.images.state_dict(), "texts": self.texts.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.images.load_state_dict(state["images"])
        self.texts.load_state_dict(state["texts"])


class Anchor:
    """A loss on given pairs of codes.

    Args:
        kind: "l2", the mean squared error; or "info_nce", each row to find its own by its cosine.
        source, target: [P, A] and [P, D].
        weight: of the loss.
        batch_size: pairs in an update, at most.
    """

    def __init__(self, kind: str, source: Tensor, target: Tensor, weight: float, batch_size: int):
        self.kind, self.source, self.target, self.weight = kind, source, target, weight
        self.batch_size = batch_size

    def __call__(self, network: nn.Module) -> Tensor:
        rows = torch.randperm(len(self.source))[: self.batch_size]
        mapped, target = network(self.source[rows]), self.target[rows]
        if self.kind == "l2":
            return self.weight * F.mse_loss(mapped, target)
        return self.weight * info_nce(mapped, target, ANCHOR_SHARPNESS, normalize=True)


class MappingRecipe(Recipe):
    """Both maps of a family as the loop sees them; a step updates each once.

    Args:
        config: of the training.
        family: which.
        image, text: directories of the autoencoders.
        data: "emoji", or a folder or tar shards of captioned pictures.
        device: auto, cpu or cuda.
        seed: of weights and of the order of codes.
        samples: captions in a sample grid.
    """

    system = "mapping"
    batches: CodeDraws
    unbound = ("loop", "families")

    def __init__(
        self,
        config: MappingTraining,
        family: Family,
        image: Path,
        text: Path,
        data: str,
        device: str,
        seed: int,
        samples: int = 16,
    ) -> None:
        self.config, self.family, self.image, self.text = config, family, image, text
        self.data, self.seed, self.samples = data, seed, samples
        self.device = pick_device(device)
        self.images_per_step = config.batch_size

    def identity(self) -> dict[str, Any]:
        stands_on = {
            part: file_digest(folder / "model.safetensors")[:12]
            for part, folder in {"image": self.image, "text": self.text}.items()
        }
        made = {"family": self.family, "data": self.data, "seed": self.seed}
        return {**super().identity(), **made, **stands_on}

    def build(self) -> None:
        config = self.config
        seed_all(self.seed, self.device)
        image = ImageAutoencoder.from_pretrained(self.image)
        text = TextAutoencoder.from_pretrained(self.text)
        made_of = CrossModalConfig(image.config, text.config, self.family, config.hidden)
        self.model = CrossModalAutoencoder(made_of)
        self.model.image.load_state_dict(image.state_dict())
        self.model.text.load_state_dict(text.state_dict())
        self.model.to(self.device).eval()
        whole = open_dataset(self.data, image.config.image_size, "train")
        self.dataset = whole.select(principal(whole))
        self.codes = Codes.of(self.dataset, self.model.image, self.model.text)
        self.build_maps()
        self.players = {
            f"{name}_{role}": player
            for name, mapper in self.mappers.items()
            for role, player in mapper.players.items()
        }
        if config.anchor != "none":
            self.set_anchors()
        self.before = self.measure()

    def build_maps(self) -> None:
        """The maps, what trains them, and their averages, which are the model's."""
        config, model = self.config, self.model
        maps: dict[str, CodeMap] = {
            "image_to_text": model.image_to_text,
            "text_to_image": model.text_to_image,
        }
        if config.standardise:
            model.image_to_text.fit(self.codes.mean, self.codes.text)
            model.text_to_image.fit(self.codes.text, self.codes.mean)
        self.batches = CodeDraws(
            self.codes,
            config.batch_size,
            stochastic=config.stochastic,
            seed=self.seed,
            see_image=model.image_to_text.see,
            see_text=model.text_to_image.see,
        )
        kernel = RBF(config.bandwidths)
        self.mappers: dict[str, Mapper] = {
            name: make(
                maps[name].network, kernel, config.lr_scale, config.mmd_gan, config.gan_critic
            )
            for name, make in MAPPERS[self.family].items()
        }
        self.maps = nn.ModuleDict(maps)
        self.average = EMA(self.maps, config.ema_decay, ramp=True)
        for name, averaged in self.average.network.items():
            setattr(model, name, averaged)

    def set_anchors(self) -> None:
        """Gives the maps the pairs: pictures drawn by weight, each with one of its captions."""
        config, count = self.config, min(self.config.anchor_pairs, len(self.dataset))
        source = np.random.default_rng(self.seed)
        chance = self.dataset.weights / self.dataset.weights.sum()
        rows = source.choice(len(self.dataset), count, replace=False, p=chance)
        captions = [source.choice(self.dataset.captions[row]).item() for row in rows]
        image = self.batches.see_image(self.codes.mean[torch.from_numpy(rows)])
        text = self.batches.see_text(self.model.text.embed(captions))
        make = partial(Anchor, config.anchor, weight=config.anchor_weight)
        size = config.batch_size
        self.mappers["image_to_text"].anchor = make(image, text, batch_size=size)
        self.mappers["text_to_image"].anchor = make(text, image, batch_size=size)

    def step(self, batch: CodeDraws) -> dict[str, Tensor]:
        metrics = self.mappers["image_to_text"].step(batch.text, batch.image)
        found = {f"{name}_to_text": value for name, value in metrics.items()}
        metrics = self.mappers["text_to_image"].step(batch.image, batch.text)
        self.average.update(self.maps)
        return {**found, **{f"{name}_to_image": value for name, value in metrics.items()}}

    @torch.no_grad()
    def measure(self, *, floor: bool = False) -> dict[str, float]:
        """Unbiased MMD^2 of true codes and mapped ones, in the true ones' kernel; draws on its own.

        With `floor`, of true codes and other true ones: about 0, of either sign.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.distances(floor)

    def distances(self, floor: bool) -> dict[str, float]:
        """What `measure` gives, of codes drawn by the global generators."""
        draws = CodeDraws(self.codes, MEASURED, stochastic=self.config.stochastic, seed=12345)
        found = {}
        for name in self.mappers:
            to_text = name == "image_to_text"
            true, source = (draws.text, draws.image) if to_text else (draws.image, draws.text)
            real = true()
            other = true() if floor else getattr(self.model, name)(source())
            found[name] = mmd2(real, other, kernel_of(real), estimator="unbiased").item()
        return found

    @torch.no_grad()
    def sample(self) -> Samples:
        rows = [len(self.dataset) * k // self.samples for k in range(self.samples)]
        captions = [self.dataset.captions[row][0] for row in rows]
        return Samples(self.model.generate(captions, seed=self.seed), captions)

    def state_dict(self) -> State:
        updates = {name: mapper.updates for name, mapper in self.mappers.items()}
        return {**super().state_dict(), "updates": updates, "average": self.average.state_dict()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.average.load_state_dict(state["average"])
        for name, mapper in self.mappers.items():
            mapper.updates = state["updates"][name]

    def export(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
        found = {"kernel": "RBF of 1/4 to 4 median distances, unbiased", "rows": MEASURED}
        found = {**found, "before": self.before, "after": self.measure()}
        found["floor"] = self.measure(floor=True)
        (directory / "mmd2.json").write_text(json.dumps(found, indent=1) + "\n")
