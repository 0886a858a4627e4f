"""XMC-GAN's training: a step of the discriminator alone, then one of both players at once.

    L_D = hinge + word(real) + sentence(real)
    L_G = -D(fake) + word(fake) + sentence(fake) + image(fake, real) + pretrained(fake, real)

In the joint step the generator and the discriminator run once each; both gradients come from those
activations, the generator's with respect to the discriminator before its update. The discriminator
is never trained on contrastive losses of generated pictures.
(Zhang et al., XMC-GAN, CVPR 2021, section 4; the schedule is that of the released code.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastxm import losses
from fastxm.data import BatchSampler, CaptionedImages, open_dataset, text_features
from fastxm.data.transforms import augment
from fastxm.encoders import EfficientNetLite0, image_encoder, text_encoder
from fastxm.models.xmcgan import XMCGAN, DiscriminatorOutput, Generator, XMCGANConfig
from fastxm.nn import take_statistics
from fastxm.training.batches import Batch, CaptionedBatches, split
from fastxm.training.ema import EMA
from fastxm.training.precision import Precision, autocast, check_precision, pick_device, seed_all
from fastxm.training.recipe import Player, Recipe, Samples, State
from fastxm.training.trainer import LoopConfig

STATISTICS = 64  # batches that the moving average's own statistics are taken over


@dataclass(frozen=True)
class XMCGANTraining:
    """Everything that decides a training of XMC-GAN."""

    model: XMCGANConfig = field(default_factory=XMCGANConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    data: str = "emoji"
    """"emoji", or a folder of captioned pictures."""
    batch_size: int = 64
    """Pictures in each of the updates of a step."""
    d_steps_per_g: int = 2
    """Updates of the discriminator in a step; the last is joint with the generator's."""
    lr_g: float = 1e-4
    """Adam's step of the generator."""
    lr_d: float = 4e-4
    """Adam's step of the discriminator."""
    d_warmup: int = 0
    """Steps over which the discriminator's rises from 0 to lr_d, in proportion."""
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
    word_weight: float = 1.0
    """Weight of the region-word loss, for both players."""
    sentence_weight: float = 1.0
    """Weight of the sentence loss, for both players."""
    image_weight: float = 1.0
    """Weight of the image-image loss in the discriminator's space."""
    pretrained_weight: float = 1.0
    """Weight of the image-image loss in EfficientNet-Lite0's space."""
    pretrained_size: int = 224
    """Side of the pictures that EfficientNet-Lite0 is given."""
    augment: str = ""
    """Of real and generated pictures: any of color,translation,cutout."""
    flip: bool = False
    """Mirror half of the real pictures."""
    precision: Precision = "bf16"
    """Arithmetic of convolutions and matrix products."""
    compile: bool = False
    """torch.compile both networks."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of weights, noise, augmentation and the order of the data."""
    samples: int = 32
    """Pictures in a sample grid."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "d_steps_per_g", "samples", "pretrained_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr_g", "lr_d"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.d_warmup < 0:
            raise ValueError(f"d_warmup must be at least 0, not {self.d_warmup}")


class XMCGANRecipe(Recipe):
    """XMC-GAN as the loop sees it.

    Args:
        config: of the training.
    """

    system = "xmcgan"
    batches: CaptionedBatches
    unbound = ("loop", "device", "compile")

    def __init__(self, config: XMCGANTraining):
        self.config = config
        self.images_per_step = config.batch_size * config.d_steps_per_g
        self.device = pick_device(config.device)
        check_precision(config.precision, self.device)

    def build(self) -> None:
        config = self.config
        seed_all(config.seed, self.device)
        encoder = text_encoder(config.model.text_encoder, max_length=config.model.words)
        if encoder.width != config.model.text_width:
            name, width = config.model.text_encoder, config.model.text_width
            raise ValueError(f"{name} has text_width {encoder.width}, the configuration {width}")
        self.batches = self.open(encoder)
        self.model = XMCGAN(config.model).train().to(self.device)  # channels_last by itself
        self.generator: Callable[..., Any] = self.model.generator
        self.discriminator: Callable[..., Any] = self.model.discriminator
        self.players = {
            "generator": self.player(self.generator, config.lr_g),
            "discriminator": self.player(self.discriminator, config.lr_d),
        }
        self.ema = EMA(self.generator, config.ema_decay, ramp=config.ema_ramp)
        self.statistics_of: int | None = None  # the update whose average has its own statistics
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.features = self.pretrained() if config.pretrained_weight else None
        if config.compile:
            self.compile()

    def open(self, encoder: Any) -> CaptionedBatches:
        """The training data; sets aside what is drawn in the sample grids."""
        config = self.config
        size = config.model.image_size
        train = open_dataset(config.data, size, "train")
        held_out = open_dataset(config.data, size, "val")
        self.captions = sample_captions([train, held_out], config.samples)
        self.text = {k: v.to(self.device) for k, v in encoder(self.captions)._asdict().items()}
        generator = torch.Generator().manual_seed(config.seed)
        shape = (len(self.captions), config.model.z_dim)
        self.noise = torch.randn(shape, generator=generator).to(self.device)
        return CaptionedBatches(
            train,
            text_features(train, encoder),
            self.images_per_step,
            seed=config.seed,
            flip=config.flip,
            device=self.device,
        )

    def player(self, network: nn.Module, lr: float) -> Player:
        betas = (self.config.beta1, self.config.beta2)
        return Player(network, torch.optim.Adam(network.parameters(), lr, betas, fused=True))

    def pretrained(self) -> EfficientNetLite0:
        size = self.config.pretrained_size
        return image_encoder("efficientnet-lite0", image_size=size).to(self.device)

    def compile(self) -> None:
        # two gradients are taken from one forward: its buffers may not be given away by the first
        torch._functorch.config.donated_buffer = False
        self.generator = torch.compile(self.generator, fullgraph=True)
        self.discriminator = torch.compile(self.discriminator, fullgraph=True)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        self.warm_up()
        *alone, joint = split(batch, self.config.d_steps_per_g)
        for part in alone:
            self.discriminator_step(part)
        metrics = self.joint_step(joint)
        self.ema.update(self.model.generator)
        return metrics

    def warm_up(self) -> None:
        """Sets the discriminator's step size: a sharp judge at once leaves a generator behind."""
        share = min(1.0, (self.ema.updates + 1) / max(1, self.config.d_warmup))
        for group in self.players["discriminator"].optimizer.param_groups:
            group["lr"] = self.config.lr_d * share

    def discriminator_step(self, batch: Batch) -> None:
        """One update of the discriminator; the generator's running statistics do not move."""
        with torch.no_grad():
            fake = self.generate(batch, update_stats=False)
        of_real, of_fake = self.judge(batch, fake)
        loss, _ = self.discriminator_loss(of_real, of_fake, batch)
        parameters = list(self.model.discriminator.parameters())
        self.update({"discriminator": gradients(self.scaler.scale(loss), parameters)})

    def joint_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of both players from one forward of each."""
        fake = self.generate(batch, update_stats=True)
        of_real, of_fake = self.judge(batch, fake)
        loss_d, of_d = self.discriminator_loss(of_real, of_fake, batch)
        loss_g, of_g = self.generator_loss(of_real, of_fake, batch, fake)
        d, g = list(self.model.discriminator.parameters()), list(self.model.generator.parameters())
        scale = self.scaler.scale
        self.update(
            {
                "discriminator": gradients(scale(loss_d), d, retain_graph=True),
                "generator": gradients(scale(loss_g), g),
            }
        )
        metrics = {"loss_d": loss_d, "loss_g": loss_g, **of_d, **of_g}
        return {name: value.detach() for name, value in metrics.items()}

    def generate(self, batch: Batch, *, update_stats: bool) -> Tensor:
        z = torch.randn(len(batch["image"]), self.config.model.z_dim, device=self.device)
        with autocast(self.config.precision, self.device):
            text = batch["words"], batch["sentence"], batch["lengths"]
            return self.generator(z, *text, update_stats=update_stats)

    def judge(self, batch: Batch, fake: Tensor) -> list[DiscriminatorOutput]:
        """What the discriminator makes of the real pictures and of the generated ones."""
        groups = [batch["image"], fake]
        if self.config.augment:
            groups = [augment(images, self.config.augment) for images in groups]
        groups = [images.contiguous(memory_format=torch.channels_last) for images in groups]
        with autocast(self.config.precision, self.device):
            return self.discriminator(groups, batch["sentence"])

    def discriminator_loss(
        self, real: DiscriminatorOutput, fake: DiscriminatorOutput, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gan = losses.hinge_d(real.logits, fake.logits)
        parts = {"d_gan": gan, **self.text_losses(real, batch, "d")}
        means = {"d_real": real.logits.mean(), "d_fake": fake.logits.mean()}
        return gan + self.weighted(parts, "d"), {**parts, **means}

    def generator_loss(
        self,
        of_real: DiscriminatorOutput,
        of_fake: DiscriminatorOutput,
        batch: Batch,
        fake: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gan = losses.hinge_g(of_fake.logits)
        parts = {"g_gan": gan, **self.text_losses(of_fake, batch, "g")}
        if self.config.image_weight:
            parts["g_image"] = losses.nce(of_fake.pooled, of_real.pooled)
        if self.features is not None:
            parts["g_pretrained"] = losses.nce(*self.pretrained_logits(fake, batch["image"]))
        return gan + self.weighted(parts, "g"), parts

    def text_losses(
        self, judged: DiscriminatorOutput, batch: Batch, player: str
    ) -> dict[str, Tensor]:
        """How well pictures and texts find each other."""
        parts = {}
        if self.config.word_weight:
            word = losses.region_word_loss(judged.regions, batch["words"], batch["lengths"])
            parts[f"{player}_word"] = word
        if self.config.sentence_weight:
            parts[f"{player}_sentence"] = losses.nce(judged.pooled, judged.sentence)
        return parts

    def weighted(self, parts: dict[str, Tensor], player: str) -> Tensor:
        names = ("word", "sentence", "image", "pretrained")
        found = [(name, parts[f"{player}_{name}"]) for name in names if f"{player}_{name}" in parts]
        return sum((getattr(self.config, f"{n}_weight") * v for n, v in found), torch.zeros(()))

    def pretrained_logits(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits of the frozen network: of generated pictures, of real ones."""
        assert self.features is not None
        with autocast(self.config.precision, self.device):
            with torch.no_grad():
                of_real = self.features.logits(real)
            return self.features.logits(fake).float(), of_real.float()

    def update(self, gradients: dict[str, tuple[Tensor, ...]]) -> None:
        """Applies gradients of (scaled) losses; fp16 skips an update that overflowed."""
        for name, values in gradients.items():
            player = self.players[name]
            for parameter, gradient in zip(player.network.parameters(), values):
                parameter.grad = as_laid_out(gradient, parameter)
            self.scaler.step(player.optimizer)
            player.optimizer.zero_grad()
        self.scaler.update()

    @torch.no_grad()
    def average(self) -> Generator:
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
            z = torch.randn(len(indices), config.model.z_dim, generator=source)
            text = features.batch(features.row(indices, numbers))
            inputs = (z, text["words"], text["sentence"], text["lengths"])
            yield tuple(tensor.to(self.device) for tensor in inputs)

    @torch.no_grad()
    def sample(self) -> Samples:
        average = self.average()
        text = self.text["words"], self.text["sentence"], self.text["lengths"]
        rows = zip(*(tensor.split(self.config.batch_size) for tensor in (self.noise, *text)))
        with autocast(self.config.precision, self.device):
            images = torch.cat([average(*row).float() for row in rows])
        return Samples(images, self.captions)

    def state_dict(self) -> State:
        extra = {"ema": self.ema.state_dict(), "scaler": self.scaler.state_dict()}
        return {**super().state_dict(), **extra}

    def load_state_dict(self, state: State) -> None:
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


def as_laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's memory order: fused Adam pairs places, not indices."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


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
