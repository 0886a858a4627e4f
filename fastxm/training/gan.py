"""What the recipes of text-to-image GANs share: updates, the moving average, samples, export."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastxm.data import BatchSampler, CaptionedImages, open_dataset, resizing
from fastxm.data.cache import digest
from fastxm.data.transforms import augment, draw
from fastxm.models.text_to_image import TextToImage
from fastxm.nn import synchronise, take_statistics
from fastxm.training.batches import CaptionedBatches
from fastxm.training.ema import EMA
from fastxm.training.precision import Precision, autocast, pick_device, pick_precision
from fastxm.training.recipe import Player, Recipe, Samples, State
from fastxm.training.trainer import LoopConfig

PICTURES, ENCODER = "pictures", "weights of the encoder"  # what checkpoints are bound to
STATISTICS = 64  # batches that the moving average's own statistics are taken over


@dataclass(frozen=True, kw_only=True)
class GANTraining:
    """What decides the training of a GAN whose players have an Adam each."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    data: str = "emoji"
    """"emoji", or a folder or tar shards of captioned pictures."""
    resize: Literal["crop", "stretch"] = "crop"
    """Of pictures in a folder or tars: cut the middle square, or keep all, out of proportion."""
    batch_size: int = 64
    """Pictures in an update, of all processes together."""
    lr_g: float = 1e-4
    """Adam's step of the generator."""
    lr_d: float = 4e-4
    """Adam's step of the discriminators."""
    d_warmup: int = 0
    """Steps over which the discriminators' rises from 0 to lr_d, in proportion."""
    beta1: float = 0.5
    """Adam's decay of the mean."""
    beta2: float = 0.999
    """Adam's decay of the square."""
    ema_decay: float = 0.999
    """Decay of the generator's moving average."""
    ema_ramp: bool = False
    """Let the moving average forget its beginning faster."""
    ema_statistics: Literal["live", "own"] = "live"
    """Batch statistics beside the average: the live network's (the released code), or its own."""
    augment: str = ""
    """Of real and generated pictures: any of color,translation,cutout."""
    flip: bool = False
    """Mirror half of the real pictures."""
    precision: Precision = "auto"
    """Arithmetic of convolutions and matrix products; auto is bf16 where the device has it."""
    compile: bool = False
    """torch.compile the generator and each discriminator."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of weights, noise, augmentation and the order of the data."""
    samples: int = 32
    """Captions in a sample grid."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr_g", "lr_d"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is in [0, 1), not {self.ema_decay}")
        if self.d_warmup < 0:
            raise ValueError(f"d_warmup must be at least 0, not {self.d_warmup}")


class GANRecipe(Recipe):
    """A generator, its discriminators and the generator's moving average.

    `build` of a system opens the data with `open`, makes `model` and `players` ("generator" among
    them), and calls `average_from` last.

    Args:
        config: of the training: a GANTraining, or what has those of its fields that are read.
    """

    batches: CaptionedBatches
    model: Any  # a TextToImage
    unbound: tuple[str, ...] = ("loop", "device", "compile")
    later = (("resize", "crop"), ("pixel_weight", 0.0), ("pixel_steps", 0),
             ("pretrained_encoder", "efficientnet-lite0"))  # fmt: skip

    def __init__(self, config: Any):
        self.device = pick_device(config.device)
        precision = pick_precision(config.precision, self.device)
        self.config = replace(config, precision=precision)
        self.images_per_step = config.batch_size

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """words, sentence and lengths of captions, on the training device."""

    @abstractmethod
    def text(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """words, sentence and lengths of a batch."""

    def open(self, image_size: int, features: Any) -> CaptionedBatches:
        """The training data; sets aside what is drawn in the sample grids.

        Args:
            image_size: side of the pictures.
            features: from a data set to its text features, as `CaptionedBatches` takes them.
        """
        config = self.config
        self.ranks.check(config.batch_size)
        options = resizing(config.data, config.resize)
        train = open_dataset(config.data, image_size, "train", **options)
        held_out = open_dataset(config.data, image_size, "val", **options)
        self.captions = sample_captions([train, held_out], config.samples)
        return CaptionedBatches(
            train,
            features(train),
            self.images_per_step,
            seed=config.seed,
            flip=config.flip,
            device=self.device,
            ranks=self.ranks,
            parts=self.images_per_step // config.batch_size,
        )

    def player(self, network: nn.Module, lr: float) -> Player:
        betas = (self.config.beta1, self.config.beta2)
        return Player(network, torch.optim.Adam(network.parameters(), lr, betas, fused=True))

    def average_from(self, model: TextToImage) -> None:
        """Starts the moving average of the model's generator."""
        config = self.config
        self.model = model
        self.ema = EMA(model.generator, config.ema_decay, ramp=config.ema_ramp)
        for player in self.players.values():  # not the average: one rank draws of it
            synchronise(player.network, self.ranks.group, config.batch_size)
        self.statistics_of: int | None = None  # the update whose average has its own statistics
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")

    @cached_property
    def sample_inputs(self) -> tuple[Tensor, ...]:
        """Noise and text of the sample grids."""
        source = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(len(self.captions), self.model.noise_width, generator=source)
        return (noise.to(self.device), *self.encode(self.captions))

    @property
    def share(self) -> float:
        """Of this process's pictures in a mean over those of all."""
        return self.ranks.share(self.config.batch_size)

    def draw_noise(self, width: int) -> Tensor:
        """What this process's pictures are drawn of: [B, width], standard normal."""
        return self.ranks.own(torch.randn(self.config.batch_size, width, device=self.device))

    def augment(self, images: Tensor) -> Tensor:
        """This process's pictures [B, 3, S, S] in [0, 1], augmented as the configuration says."""
        drawn = self.ranks.own(draw(self.config.batch_size, device=self.device))
        return augment(images, self.config.augment, parameters=drawn)

    def warm_up(self, names: Sequence[str], *, since: int = 0) -> None:
        """Sets the discriminators' step size: a sharp judge at once leaves a generator behind.

        Args:
            names: the players.
            since: the generator's updates before the first that is judged.
        """
        share = min(1.0, (self.ema.updates - since + 1) / max(1, self.config.d_warmup))
        for name in names:
            for group in self.players[name].optimizer.param_groups:
                group["lr"] = self.config.lr_d * share

    def update(self, gradients: dict[str, tuple[Tensor, ...]]) -> None:
        """Applies gradients of (scaled) losses; fp16 skips an update that overflowed."""
        mean = iter(self.ranks.average([t for values in gradients.values() for t in values]))
        for name, values in gradients.items():
            player = self.players[name]
            player.take([next(mean) for _ in values])
            self.scaler.step(player.optimizer)
            player.optimizer.zero_grad()
        self.scaler.update()

    @torch.no_grad()
    def average(self) -> Any:
        """The generator's moving average, ready to draw; what training does next stays the same."""
        network, updates = self.ema.network, self.ema.updates
        if self.config.ema_statistics == "own" and self.statistics_of != updates:
            with autocast(self.config.precision, self.device):
                take_statistics(network, self.random_inputs(STATISTICS))
            self.statistics_of = updates
        return network

    def random_inputs(self, batches: int) -> Iterator[tuple[Tensor, ...]]:
        """What generators draw of: noise, and captions as training draws them."""
        config, features = self.config, self.batches.features
        source = torch.Generator().manual_seed(config.seed)
        sampler = BatchSampler(self.batches.dataset, config.batch_size, seed=config.seed)
        for _, (indices, numbers) in zip(range(batches), sampler):
            z = torch.randn(len(indices), self.model.noise_width, generator=source)
            batch = features.batch(features.row(indices, numbers))
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with autocast("fp32", self.device):  # as in a step, wherever this is drawn from
                text = self.text(batch)
            yield (z.to(self.device), *text)

    @torch.no_grad()
    def draw(self) -> list[Any]:
        """What the average makes of the sample captions, in batches."""
        average = self.average()
        rows = zip(*(tensor.split(self.config.batch_size) for tensor in self.sample_inputs))
        with autocast(self.config.precision, self.device):
            return [average(*row) for row in rows]

    def sample(self) -> Samples:
        images = torch.cat([self.model.picture(drawn).float() for drawn in self.draw()])
        return Samples(images, self.captions)

    @cached_property
    def stands_on(self) -> dict[str, str]:
        """Digests of what a checkpoint does not hold, but has to be the same where it goes on."""
        return {PICTURES: digest(self.batches.dataset.ids)}

    def compare(self, theirs: dict[str, str], whose: str) -> None:
        """Raises ValueError where one of these digests is another here."""
        for name, value in theirs.items():
            if value != self.stands_on[name]:
                raise ValueError(
                    f"{whose} was trained with other {name} ({value}, now {self.stands_on[name]}): "
                    "give those that it began with"
                )

    def state_dict(self) -> State:
        extra = {"ema": self.ema.state_dict(), "scaler": self.scaler.state_dict()}
        return {**super().state_dict(), **extra, "stands_on": self.stands_on}

    def load_state_dict(self, state: State) -> None:
        self.compare(state.get("stands_on", {}), "the checkpoint")  # old ones have none
        super().load_state_dict(state)
        self.ema.load_state_dict(state["ema"])
        self.statistics_of = None
        self.scaler.load_state_dict(state["scaler"])

    def export(self, directory: Path) -> None:
        live, self.model.generator = self.model.generator, self.average()
        try:
            self.model.save_pretrained(directory)
        finally:
            self.model.generator = live


def gradients(
    loss: Tensor, parameters: list[nn.Parameter], *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of a loss; zero of parameters that only losses of weight 0 reach."""
    return torch.autograd.grad(
        loss, parameters, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )


def sample_captions(splits: list[CaptionedImages], count: int) -> list[str]:
    """Captions spread over what training draws, in equal shares of the splits that hold any."""
    filled = [dataset for dataset in splits if len(dataset)]
    captions = []
    for k, dataset in enumerate(filled):
        share = count * (k + 1) // len(filled) - count * k // len(filled)
        ends = np.cumsum(dataset.weights)
        points = (np.arange(share) + 0.5) / share * ends[-1]
        captions += [dataset.captions[i][0] for i in np.searchsorted(ends, points)]
    return captions


def captioned(dataset: CaptionedImages) -> CaptionedImages:
    """The pictures that have captions."""
    return dataset.select([i for i, captions in enumerate(dataset.captions) if captions])
