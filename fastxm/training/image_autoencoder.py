"""The image autoencoder's training: pictures drawn of codes, judged beside the true ones.

    L_D = real(x) + real(x | mu) + fake(x' | mu) + real(x') + fake(G(c)) + fake(G(c) | mu)
    L_G = sum over sizes of real(G(c)) + real(G(c) | mu)
          + w_kl KL(c) + w_colour colours(G(c), one size smaller, true ones) + w_pixel MSE(G(c), x)

x' is another concept's picture. Nothing but the conditional judgement and the colours of the
smallest size ties a picture to what is drawn of it, unless w_pixel is above 0 (the released code
of Das & Saha, arXiv:2112.04928; a variant in its history has w_pixel = 25).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastxm import losses
from fastxm.data import BatchSampler, CaptionedImages, open_dataset
from fastxm.data.image_features import image_features
from fastxm.data.subsets import principal
from fastxm.encoders import image_encoder
from fastxm.models.image_autoencoder import ImageAutoencoder, ImageAutoencoderConfig
from fastxm.nn.stackgan import JointDiscriminator, orthogonal_
from fastxm.training.batches import pictures, place
from fastxm.training.ema import EMA
from fastxm.training.precision import autocast, pick_device, pick_precision, seed_all
from fastxm.training.recipe import Player, Recipe, Samples, State
from fastxm.training.trainer import LoopConfig


@dataclass(frozen=True)
class ImageTraining:
    """What decides a training of the image autoencoder."""

    model: ImageAutoencoderConfig = field(default_factory=ImageAutoencoderConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    df: int = 64
    """Base channels of the discriminators."""
    batch_size: int = 24
    """Pictures in an update."""
    lr: float = 2e-4
    """Adam's step of every player."""
    beta1: float = 0.5
    """Adam's decay of the mean."""
    clip: float = 5.0
    """Largest norm of the gradient of the encoder, the decoder and each discriminator."""
    kl_weight: float = 2.0
    """Weight of the codes' divergence from a standard normal."""
    colour_weight: float = 50.0
    """Weight of the colours' agreement from size to size and with true ones."""
    pixel_weight: float = 0.0
    """Weight of the squared error of each size's pictures in [-1, 1]."""
    adversarial_weight: float = 1.0
    """Weight of the discriminators' judgement; 0 trains none."""
    ema_decay: float = 0.999
    """Decay of the moving average that is kept."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of convolutions and matrix products."""

    def __post_init__(self) -> None:
        for name in ("df", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: a picture of another concept is wrong")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("kl_weight", "colour_weight", "pixel_weight", "adversarial_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


class ImageRecipe(Recipe):
    """The image autoencoder as the loop sees it.

    Args:
        config: of the training.
        data: "emoji", or a folder or tar shards of captioned pictures.
        device: auto, cpu or cuda.
        seed: of weights, noise and the order of pictures.
        samples: pictures in a sample grid, each beside its reconstruction.
    """

    system = "image-autoencoder"
    batches: BatchSampler
    unbound = ("loop",)

    def __init__(
        self, config: ImageTraining, data: str, device: str, seed: int, samples: int = 16
    ) -> None:
        self.data, self.seed, self.samples = data, seed, samples
        self.device = pick_device(device)
        precision: Any = pick_precision(config.precision, self.device)  # one that it may have
        self.config = replace(config, precision=precision)
        self.images_per_step = config.batch_size

    def identity(self) -> dict[str, object]:
        return {**super().identity(), "data": self.data, "seed": self.seed}

    def build(self) -> None:
        config = self.config
        seed_all(self.seed, self.device)
        frozen = image_encoder(config.model.image_encoder).to(self.device)
        if frozen.width != config.model.features:
            name, width = config.model.image_encoder, config.model.features
            raise ValueError(f"{name} has features of {frozen.width}, the configuration {width}")
        self.dataset, self.features = self.open("train", frozen)
        self.shown = self.choose(frozen)
        self.batches = BatchSampler(self.dataset, config.batch_size, seed=self.seed)
        self.model = ImageAutoencoder(config.model).train().to(self.device)
        self.model.encoder.standardise.fit(self.features)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.players = {"autoencoder": self.player(self.model)}
        self.judges: dict[int, JointDiscriminator] = {}
        if config.adversarial_weight:
            for size in config.model.sizes:
                judge = JointDiscriminator(size, config.df, config.model.code)
                orthogonal_(judge)
                judge.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
                self.judges[size] = judge
                self.players[f"discriminator_{size}"] = self.player(judge)
        self.ema = EMA(self.model, config.ema_decay, ramp=True)

    def open(self, split: str, frozen: Any) -> tuple[CaptionedImages, Tensor]:
        """The principal pictures of a split and their frozen features."""
        whole = open_dataset(self.data, self.config.model.image_size, split)
        dataset = whole.select(principal(whole))
        return dataset, image_features(dataset, frozen)

    def choose(self, frozen: Any) -> tuple[Tensor, Tensor, list[str]]:
        """Pictures, features and captions of the sample grids, half of them held out."""
        parts = [(self.dataset, self.features)]
        held_out = open_dataset(self.data, self.config.model.image_size, "val")
        if len(held_out):
            parts.append(self.open("val", frozen))
        images, features, captions = [], [], []
        for dataset, known in parts:
            share = min(max(1, self.samples // len(parts)), len(dataset))
            rows = [len(dataset) * k // share for k in range(share)]
            images.append(dataset.batch(rows))
            features.append(known[rows])
            captions += [dataset.captions[row][0] for row in rows]
        return torch.cat(images), torch.cat(features), captions

    def player(self, network: nn.Module) -> Player:
        betas = (self.config.beta1, 0.999)
        optimizer = torch.optim.Adam(network.parameters(), self.config.lr, betas, fused=True)
        return Player(network, optimizer)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        rows, _ = batch
        real = self.pyramid(pictures(self.dataset, rows, self.device))
        features = place(self.features[rows], self.device)
        with autocast(self.config.precision, self.device):
            fake, mean, log_variance = self.model(features)
        metrics = self.update_judges(real, fake, mean)
        loss, parts = self.loss(real, fake, mean, log_variance)
        # the discriminators' own gradients of this loss are not taken
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        self.update("autoencoder", gradients)
        self.ema.update(self.model)
        metrics = {**metrics, "loss_g": loss, **parts}
        return {name: value.detach() for name, value in metrics.items()}

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """True pictures at every size, of those of the largest."""
        side = self.config.model.image_size
        return [F.avg_pool2d(images, side // size) for size in self.config.model.sizes]

    def update_judges(
        self, real: list[Tensor], fake: list[Tensor], mean: Tensor
    ) -> dict[str, Tensor]:
        """One update of each discriminator."""
        total, mean = torch.zeros((), device=self.device), mean.detach()
        for (size, judge), x, drawn in zip(self.judges.items(), real, fake):
            with autocast(self.config.precision, self.device):
                loss = discriminator_loss(judge, x, drawn.detach(), mean)
            parameters = list(judge.parameters())
            self.update(f"discriminator_{size}", torch.autograd.grad(loss, parameters))
            total = total + loss.detach()
        return {"loss_d": total} if self.judges else {}

    def loss(
        self, real: list[Tensor], fake: list[Tensor], mean: Tensor, log_variance: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the autoencoder minimises, and its parts."""
        config = self.config
        parts = {"kl": losses.kl_normal(mean, log_variance)}
        total = config.kl_weight * parts["kl"]
        judged = [
            self.judged(judge, drawn, mean) for judge, drawn in zip(self.judges.values(), fake)
        ]
        if judged:
            parts["g_gan"] = torch.stack(judged).sum()
            total = total + config.adversarial_weight * parts["g_gan"]
        if config.colour_weight:
            parts["colour"] = self.colour(real, fake)
            total = total + config.colour_weight * parts["colour"]
        errors = [4 * F.mse_loss(drawn, x) for drawn, x in zip(fake, real)]
        parts["pixel"] = torch.stack(errors).sum()  # in [-1, 1], as published
        return total + config.pixel_weight * parts["pixel"], parts

    def judged(self, judge: JointDiscriminator, drawn: Tensor, mean: Tensor) -> Tensor:
        with autocast(self.config.precision, self.device):
            seen = judge(drawn)
            logits = judge.real(seen), judge.matched(seen, mean)
        return losses.bce(logits[0], True) + losses.bce(logits[1], True)

    def colour(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """Each size against the one below it, the smallest against the true pictures."""
        below = [real[0], *(drawn.detach() for drawn in fake[:-1])]
        pairs = [(2 * a - 1, 2 * b - 1) for a, b in zip(fake, below)]
        return torch.stack([losses.colour_consistency(a, b) for a, b in pairs]).sum()

    def update(self, name: str, gradients: tuple[Tensor, ...]) -> None:
        player, clip = self.players[name], self.config.clip
        player.take(gradients)
        networks: list[nn.Module] = [player.network]
        if name == "autoencoder":
            networks = [self.model.encoder, self.model.decoder]
        for network in networks:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        player.optimizer.step()
        player.optimizer.zero_grad()

    @torch.no_grad()
    def sample(self) -> Samples:
        images, features, captions = self.shown
        network = self.ema.network
        code = network.encoder(features.to(self.device))[0]
        source = torch.Generator().manual_seed(self.seed)
        z = torch.randn(len(code), self.config.model.z_dim, generator=source).to(self.device)
        drawn = network.decoder(z, code)[-1].float().cpu()
        both = torch.stack([images, drawn], 1).flatten(0, 1)
        return Samples(both, [text for caption in captions for text in (caption, "its code's")])

    def state_dict(self) -> State:
        return {**super().state_dict(), "ema": self.ema.state_dict()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.ema.load_state_dict(state["ema"])

    def export(self, directory: Path) -> None:
        self.ema.network.save_pretrained(directory)


def discriminator_loss(
    judge: JointDiscriminator, real: Tensor, fake: Tensor, condition: Tensor
) -> Tensor:
    """What a discriminator minimises; wrong pictures are the next ones of the batch.

    Args:
        judge: of these pictures' size.
        real, fake: [B, 3, S, S] in [0, 1], fake[i] drawn of real[i]; no two of one concept.
        condition: [B, C], of each pair.

    Returns:
        scalar, float32.
    """
    true, drawn = judge(real), judge(fake)
    wrong = true.roll(1, 0)
    is_real = losses.bce(judge.real(true), True)  # of wrong pictures too: they are the same
    pairs = losses.bce(judge.matched(true, condition), True)
    pairs = pairs + losses.bce(judge.matched(wrong, condition), False)
    pairs = pairs + losses.bce(judge.matched(drawn, condition), False)
    return 2 * is_real + losses.bce(judge.real(drawn), False) + pairs
