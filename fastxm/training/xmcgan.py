"""XMC-GAN's training: a step of the discriminator alone, then one of both players at once.

    L_D = hinge + word(real) + sentence(real)
    L_G = -D(fake) + word(fake) + sentence(fake) + image(fake, real) + pretrained(fake, real)

In the joint step the generator and the discriminator run once each; both gradients come from those
activations, the generator's with respect to the discriminator before its update. The discriminator
is never trained on contrastive losses of generated pictures.
(Zhang et al., XMC-GAN, CVPR 2021, section 4; the schedule is that of the released code.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastxm import losses
from fastxm.data import text_features
from fastxm.encoders import image_encoder, text_encoder
from fastxm.encoders.frozen import FrozenImages
from fastxm.models.xmcgan import XMCGAN, DiscriminatorOutput, XMCGANConfig
from fastxm.training.batches import Batch, split
from fastxm.training.gan import GANRecipe, GANTraining, gradients
from fastxm.training.precision import autocast, seed_all


@dataclass(frozen=True, kw_only=True)
class XMCGANTraining(GANTraining):
    """Everything that decides a training of XMC-GAN."""

    model: XMCGANConfig = field(default_factory=XMCGANConfig)
    d_steps_per_g: int = 2
    """Updates of the discriminator in a step; the last is joint with the generator's."""
    share_fakes: bool = False
    """Let all updates of a step judge the same pictures, drawn once."""
    word_weight: float = 1.0
    """Weight of the region-word loss, for both players."""
    sentence_weight: float = 1.0
    """Weight of the sentence loss, for both players."""
    image_weight: float = 1.0
    """Weight of the image-image loss in the discriminator's space."""
    pretrained_weight: float = 1.0
    """Weight of the image-image loss in a pretrained network's space, of its class logits."""
    pretrained_encoder: str = "efficientnet-lite0"
    """That network: efficientnet-lite0, or a file of torchvision's ResNet-50."""
    pretrained_size: int = 224
    """Side of the pictures that it is given."""
    pixel_weight: float = 0.0
    """Weight of the mean difference of pixels from the real picture's, for the generator."""
    pixel_steps: int = 0
    """First steps, in which the generator learns by the pixels alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = ("word", "sentence", "image", "pretrained", "pixel")
        for name in ("pixel_steps", *(f"{part}_weight" for part in parts)):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.pixel_steps and not self.pixel_weight:
            raise ValueError(f"{self.pixel_steps} pixel_steps need a pixel_weight above 0")
        for name in ("d_steps_per_g", "pretrained_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class XMCGANRecipe(GANRecipe):
    """XMC-GAN as the loop sees it.

    Args:
        config: of the training.
    """

    system = "xmcgan"
    spans = True

    def __init__(self, config: XMCGANTraining):
        super().__init__(config)
        self.images_per_step = config.batch_size * config.d_steps_per_g

    def build(self) -> None:
        config = self.config
        self.features = self.pretrained() if config.pretrained_weight else None
        seed_all(config.seed, self.device)
        encoder = text_encoder(
            config.model.text_encoder,
            max_length=config.model.words,
            sentence=config.model.sentence,
        ).to(self.device)
        if encoder.width != config.model.text_width:
            name, width = config.model.text_encoder, config.model.text_width
            raise ValueError(f"{name} has text_width {encoder.width}, the configuration {width}")
        self.encoder = encoder
        size = config.model.image_size
        self.batches = self.open(size, lambda dataset: text_features(dataset, encoder))
        model = XMCGAN(config.model).train().to(self.device)  # channels_last by itself
        self.generator: Callable[..., Any] = model.generator
        self.discriminator: Callable[..., Any] = model.discriminator
        self.players = {
            "generator": self.player(model.generator, config.lr_g),
            "discriminator": self.player(model.discriminator, config.lr_d),
        }
        self.average_from(model)
        if config.compile:
            self.compile()

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(part.to(self.device) for part in self.encoder(captions))

    def text(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch["words"], batch["sentence"], batch["lengths"]

    def pretrained(self) -> FrozenImages:
        source, size = self.config.pretrained_encoder, self.config.pretrained_size
        return image_encoder(source, image_size=size).to(self.device)

    def compile(self) -> None:
        # two gradients are taken from one forward: its buffers may not be given away by the first
        torch._functorch.config.donated_buffer = False
        self.generator = torch.compile(self.generator, fullgraph=True)
        self.discriminator = torch.compile(self.discriminator, fullgraph=True)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        *alone, joint = split(batch, self.config.d_steps_per_g)
        if self.ema.updates < self.config.pixel_steps:
            metrics = self.pixel_step(joint)
        else:
            metrics = self.adversarial_step(alone, joint)
        self.ema.update(self.model.generator)
        return metrics

    def pixel_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the generator alone, by the real pictures of its captions.

        What is where comes much sooner so than from a discriminator that has yet to learn it.
        """
        fake = self.generate(batch, update_stats=True)
        pixels = self.pixels(fake, batch)
        loss = self.config.pixel_weight * pixels
        parameters = list(self.model.generator.parameters())
        self.update({"generator": gradients(self.scaler.scale(loss), parameters)})
        return {"loss_g": loss.detach(), "g_pixel": pixels.detach()}

    def adversarial_step(self, alone: list[Batch], joint: Batch) -> dict[str, Tensor]:
        self.warm_up(["discriminator"], since=self.config.pixel_steps)
        fake = self.generate(joint, update_stats=True) if self.config.share_fakes else None
        for part in alone:
            self.discriminator_step(part, fake, joint)
        return self.joint_step(joint, fake)

    def discriminator_step(
        self, batch: Batch, fake: Tensor | None = None, of: Batch | None = None
    ) -> None:
        """One update of the discriminator; the generator's running statistics do not move.

        Args:
            batch: real pictures and their texts.
            fake: pictures of the texts of another batch, `of`; None draws them of the batch's.
        """
        if fake is None or of is None:
            with torch.no_grad():
                fake, of = self.generate(batch, update_stats=False), batch
        of_real, of_fake = self.judge(batch, fake.detach(), of)
        loss, _ = self.discriminator_loss(of_real, of_fake, batch)
        parameters = list(self.model.discriminator.parameters())
        self.update({"discriminator": gradients(self.scaler.scale(loss), parameters)})

    def joint_step(self, batch: Batch, fake: Tensor | None = None) -> dict[str, Tensor]:
        """One update of both players from one forward of each; draws `fake` if it is not given."""
        if fake is None:
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
        z = self.draw_noise(self.config.model.z_dim)
        with autocast(self.config.precision, self.device):
            return self.generator(z, *self.text(batch), update_stats=update_stats)

    def judge(
        self, batch: Batch, fake: Tensor, of: Batch | None = None
    ) -> list[DiscriminatorOutput]:
        """What the discriminator makes of real pictures, and of drawn ones (`of` another batch)."""
        groups = [batch["image"], fake]
        if self.config.augment:
            groups = [self.augment(images) for images in groups]
        groups = [images.contiguous(memory_format=torch.channels_last) for images in groups]
        with autocast(self.config.precision, self.device):
            return self.discriminator(groups, [batch["sentence"], (of or batch)["sentence"]])

    def discriminator_loss(
        self, real: DiscriminatorOutput, fake: DiscriminatorOutput, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gan = self.share * losses.hinge_d(real.logits, fake.logits)
        parts = {"d_gan": gan, **self.text_losses(real, batch, "d")}
        judged = {"d_real": real, "d_fake": fake}
        means = {name: self.share * of.logits.mean() for name, of in judged.items()}
        return gan + self.weighted(parts, "d"), {**parts, **means}

    def generator_loss(
        self,
        of_real: DiscriminatorOutput,
        of_fake: DiscriminatorOutput,
        batch: Batch,
        fake: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gan = self.share * losses.hinge_g(of_fake.logits)
        parts = {"g_gan": gan, **self.text_losses(of_fake, batch, "g")}
        if self.config.image_weight:
            parts["g_image"] = self.nce(of_fake.pooled, of_real.pooled)
        if self.features is not None:
            parts["g_pretrained"] = self.nce(*self.pretrained_logits(fake, batch["image"]))
        if self.config.pixel_weight:
            parts["g_pixel"] = self.pixels(fake, batch)
        return gan + self.weighted(parts, "g"), parts

    def text_losses(
        self, judged: DiscriminatorOutput, batch: Batch, player: str
    ) -> dict[str, Tensor]:
        """How well pictures and texts find each other."""
        parts = {}
        if self.config.word_weight:
            text, group = (batch["words"], batch["lengths"]), self.ranks.group
            parts[f"{player}_word"] = losses.region_word_loss(judged.regions, *text, group=group)
        if self.config.sentence_weight:
            parts[f"{player}_sentence"] = self.nce(judged.pooled, judged.sentence)
        return parts

    def pixels(self, fake: Tensor, batch: Batch) -> Tensor:
        """Mean absolute difference from the real pictures: of pixels, and of 16 x 16 means."""
        real = batch["image"]
        coarse = F.l1_loss(F.adaptive_avg_pool2d(fake, 16), F.adaptive_avg_pool2d(real, 16))
        return self.share * (F.l1_loss(fake, real) + coarse)

    def nce(self, a: Tensor, b: Tensor) -> Tensor:
        return losses.nce(a, b, group=self.ranks.group)

    def weighted(self, parts: dict[str, Tensor], player: str) -> Tensor:
        names = ("word", "sentence", "image", "pretrained", "pixel")
        found = [(name, parts[f"{player}_{name}"]) for name in names if f"{player}_{name}" in parts]
        return sum((getattr(self.config, f"{n}_weight") * v for n, v in found), torch.zeros(()))

    def pretrained_logits(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits of the frozen network: of generated pictures, of real ones."""
        assert self.features is not None
        with autocast(self.config.precision, self.device):
            with torch.no_grad():
                of_real = self.features.logits(real)
            return self.features.logits(fake).float(), of_real.float()
