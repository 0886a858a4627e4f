"""LAFITE's training: a StyleGAN2 on pictures, whose texts are made of the pictures' embeddings.

    L_G = softplus(-D(G, h)) + itc C(f(G), h) + itd C(f_s(G), h)
          [+ iic C(f(G), z) + iid C(f_s(x), f_s(G))]
    L_D = softplus(D(G, h)) + softplus(-D(x, h)) + itd C(f_s(x), h) + R1 every 16 steps

h is drawn anew in every phase: a perturbed picture embedding z, or the embedding of a caption where
one may be learnt from. f is the frozen joint encoder, on a random square of the picture.
(Zhou et al., LAFITE, CVPR 2022; values of the released code.)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastxm import losses
from fastxm.data.transforms import augment, draw, random_square
from fastxm.encoders.frozen import Looks
from fastxm.models.lafite import LAFITE
from fastxm.models.pretrained import Pretrained
from fastxm.nn.directions import Noise, draw_noise
from fastxm.nn.stylegan import GROUP
from fastxm.training.batches import Batch
from fastxm.training.diagnostics import HeldOutPairs
from fastxm.training.ema import EMA
from fastxm.training.embeddings import EmbeddedBatches
from fastxm.training.gan import ENCODER, GANRecipe, captioned, gradients, sample_captions
from fastxm.training.joint_data import JointData
from fastxm.training.lafite_config import LAFITETraining as LAFITETraining
from fastxm.training.precision import autocast, seed_all
from fastxm.training.ranks import Shares
from fastxm.training.recipe import Player, State

Drawn = tuple[Tensor, Tensor]  # conditions and pictures of them
# of the generator and of the discriminator
ADVERSARIAL: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "logistic": (losses.logistic_g, losses.logistic_d),
    "hinge": (losses.hinge_g, losses.hinge_d),
}


class LAFITERecipe(GANRecipe):
    """LAFITE as the loop sees it.

    Args:
        config: of the training.
    """

    system = "lafite"
    spans = True
    model_class: type[LAFITE] = LAFITE
    batches: EmbeddedBatches  # type: ignore[assignment]
    model: LAFITE

    def build(self) -> None:
        config = self.config
        self.shares = Shares(self.ranks, config.batch_size, GROUP)
        if config.compile and config.model.logit == "batch" and self.ranks.size > 1:
            raise ValueError("logit batch is a sum over processes, which no compiled code holds")
        data = self.open_data()
        self.encoder, self.fingerprint = data.encoder, data.fingerprint
        seed_all(config.seed, self.device)
        made_of = config.model
        if config.encoder and not isinstance(self.encoder, Pretrained):  # not saved with the model
            made_of = replace(made_of, joint_encoder=str(Path(config.encoder).resolve()))
        model = self.model_class(made_of)
        model.attach(self.encoder)
        self.model = model.train().to(self.device)  # channels_last by itself
        self.batches = self.open_pictures(data)
        model.discriminator.group = self.ranks.group
        self.synthesis: Callable[..., Any] = model.generator.synthesis
        self.discriminator: Callable[..., Any] = model.discriminator
        self.grain = {"noise": self.shares.grain} if self.ranks.size > 1 else {}
        if isinstance(model.discriminator, Looks):
            model.discriminator.load()
        if config.compile:
            self.synthesis = torch.compile(self.synthesis, fullgraph=True)
            self.discriminator = torch.compile(self.discriminator, fullgraph=True)
        self.players = self.make_players()
        self.ema = EMA(model.generator)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.adversarial = ADVERSARIAL[config.adversarial]
        self.path_mean = torch.zeros((), device=self.device)
        self.done = 0

    def open_data(self) -> JointData:
        """The joint encoder and the pictures."""
        return JointData(self.config, self.device, self.ranks)

    def open_pictures(self, data: JointData) -> EmbeddedBatches:
        """The training data; sets aside what is measured and drawn in the sample grids."""
        config, train, held_out = self.config, data.train, data.held_out
        embeddings = data.embed(train, label_fraction=config.label_fraction)
        self.pairs = None
        if any(held_out.captions):
            self.pairs = HeldOutPairs(held_out, data.embed, config.seed, config.model.noise)
        parts = [captioned(part) for part in (train, held_out)]
        self.captions = []
        if any(len(part) for part in parts):
            self.captions = sample_captions(parts, config.samples)
        options: dict[str, Any] = {"seed": config.seed, "flip": config.flip, "device": self.device}
        options |= {"ranks": self.ranks, "parts": self.shares.parts}
        return EmbeddedBatches(train, embeddings, config.batch_size, **options)

    def make_players(self) -> dict[str, Player]:
        config, model = self.config, self.model
        lr_d = config.lr_d or config.lr
        players = {
            "generator": self.lazy_player(model.generator, config.path_every, config.lr),
            "discriminator": self.lazy_player(model.discriminator, config.r1_every, lr_d),
        }
        if config.model.perturbation == "trained":
            heads = model.perturbation
            players["perturbation"] = Player(heads, torch.optim.Adam(heads.parameters(), 1e-3))
        return players

    def lazy_player(self, network: nn.Module, every: int, lr: float) -> Player:
        """Adam corrected for one more update every `every` steps (Karras et al. 2020, B)."""
        share = every / (every + 1) if every else 1.0
        options: dict[str, Any] = {"betas": (0.0, 0.99**share), "eps": 1e-8, "fused": True}
        return Player(network, torch.optim.Adam(network.parameters(), lr * share, **options))

    # what the base asks for: texts of the sample grids

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(list(captions), self.config.batch_size))

    def text(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.model.condition(batch["text"]),)

    @cached_property
    def sample_inputs(self) -> tuple[Tensor, ...]:
        if self.captions:
            with torch.no_grad():
                return super().sample_inputs
        # without any caption, what is drawn is of the embeddings of pictures
        embeddings = self.batches.embeddings.image[: self.config.samples]
        self.captions = [f"picture {id}" for id in self.batches.dataset.ids[: len(embeddings)]]
        source = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(len(embeddings), self.model.noise_width, generator=source)
        return noise.to(self.device), self.model.condition(embeddings.to(self.device))

    def average(self) -> Any:
        return self.ema.network

    # the stages and a step of each

    def stages(self) -> list[tuple[str, int | None]]:
        """Names of the stages and how many steps each has; the last goes on to the end."""
        trained = self.config.model.perturbation == "trained"
        first = [("perturbation", self.config.perturbation_steps)] if trained else []
        return [*first, ("adversarial", None)]

    def stage(self) -> tuple[str, int]:
        """The stage of the next step, and how many of its steps are done."""
        done = self.done
        for name, steps in self.stages():
            if steps is None or done < steps:
                return name, done
            done -= steps
        raise AssertionError("the last stage has no end")

    def step(self, batch: Batch) -> dict[str, Tensor]:
        name, done = self.stage()
        metrics = getattr(self, f"{name}_step")(batch, done)
        self.done += 1
        return {name: value.detach() for name, value in metrics.items()}

    def held_out(self) -> dict[str, float]:
        """How near sampled text embeddings are to those of held-out captions; {} without any."""
        return self.pairs.measure(self.model) if self.pairs else {}

    def perturbation_step(self, batch: Batch, done: int) -> dict[str, Tensor]:
        """One update of the trained perturbation: samples are to find their own pictures.

        The released code trains it apart, with this loss; of which pairs is not known.
        """
        z = batch["embedding"]
        t = self.pseudo_text(batch).sample(self.noise(len(z)))
        loss = losses.pseudo_text_loss(
            z, t, temperature=0.1, text_share=0.5, sharpened=True, group=self.ranks.group
        )
        self.apply("perturbation", loss)
        return {"loss_perturbation": loss}

    def adversarial_step(self, batch: Batch, done: int) -> dict[str, Tensor]:
        """An update of generator and discriminator, and of their regularisers in turn."""
        config = self.config
        metrics, drawn = self.generator_update(batch)
        if config.path_every and done % config.path_every == 0:
            metrics |= self.path_update(batch)
        drawn = drawn if config.share_fakes else self.draw_anew(batch)
        metrics |= self.discriminator_update(batch, drawn)
        if config.r1_every and done % config.r1_every == 0:
            metrics |= self.r1_update(batch)
        self.update_average()
        return metrics

    def generator_update(self, batch: Batch) -> tuple[dict[str, Tensor], Drawn]:
        with torch.no_grad():
            text = self.draw_text(batch)
        loss, parts, drawn = self.generator_loss(batch, text)
        self.apply("generator", loss)
        return {"loss_g": loss, **parts}, drawn

    def generator_loss(self, batch: Batch, text: Tensor) -> tuple[Tensor, dict[str, Tensor], Drawn]:
        """The generator's loss on texts [B, D], its parts, and what was drawn."""
        config = self.config
        condition = self.condition(batch, text)
        with autocast(config.precision, self.device):
            fake = self.draw_pictures(condition)
            judged = self.discriminator(self.augmented(fake), condition)
        gan = self.shares.share * self.adversarial[0](judged.logits)
        weights = self.seen_weights()
        parts = self.seen_losses(fake, text, batch, weights)
        if config.semantic_weight:
            parts["g_semantic"] = self.contrast(judged.semantic, condition)
        if config.feature_weight:
            with torch.no_grad(), autocast(config.precision, self.device):
                of_real = self.discriminator(self.augmented(batch["image"]), condition).semantic
            parts["g_feature"] = self.contrast(of_real, judged.semantic)
        weights |= {"g_semantic": config.semantic_weight, "g_feature": config.feature_weight}
        total = sum((weights[name] * part for name, part in parts.items()), gan)
        return total, {"g_gan": gan, **parts}, (condition.detach(), fake.detach())

    def seen_weights(self) -> dict[str, float]:
        """Of the generator's losses in the encoder's space."""
        return {"g_encoder": self.config.encoder_weight, "g_picture": self.config.picture_weight}

    def seen_losses(
        self, fake: Tensor, text: Tensor, batch: Batch, weights: dict[str, float]
    ) -> dict[str, Tensor]:
        """Losses of drawn pictures in the encoder's space, those whose weight is not 0."""
        names = [name for name, weight in weights.items() if weight]
        seen = self.see(fake) if names else fake
        return {name: self.seen_loss(name, seen, text, batch) for name in names}

    def seen_loss(self, name: str, seen: Tensor, text: Tensor, batch: Batch) -> Tensor:
        """One of them, of embeddings [B, D] of drawn pictures and of their texts."""
        return self.contrast(seen, batch["embedding"] if name == "g_picture" else text)

    def discriminator_update(self, batch: Batch, drawn: Drawn) -> dict[str, Tensor]:
        config, (condition, fake) = self.config, drawn
        with autocast(config.precision, self.device):
            of_fake = self.discriminator(self.augmented(fake), condition)
            of_real = self.discriminator(self.augmented(batch["image"]), condition)
        loss = self.shares.share * self.adversarial[1](of_real.logits, of_fake.logits)
        means = {"d_real": of_real.logits.mean(), "d_fake": of_fake.logits.mean()}
        parts = {"d_gan": loss, **{name: self.shares.share * mean for name, mean in means.items()}}
        if config.semantic_weight:
            parts["d_semantic"] = self.contrast(of_real.semantic, condition)
            loss = loss + config.semantic_weight * parts["d_semantic"]
        self.apply("discriminator", loss)
        return {"loss_d": loss, **parts}

    @torch.no_grad()
    def draw_anew(self, batch: Batch) -> Drawn:
        """Conditions of a batch and pictures of them."""
        condition = self.condition(batch, self.draw_text(batch))
        with autocast(self.config.precision, self.device):
            return condition, self.draw_pictures(condition)

    def r1_update(self, batch: Batch) -> dict[str, Tensor]:
        """R1's own update, weighed for the steps it stands for."""
        with torch.no_grad():
            condition = self.condition(batch, self.draw_text(batch))
        real = self.laid_out(batch["image"]).detach().requires_grad_()
        with autocast(self.config.precision, self.device):
            logits = self.model.discriminator(self.augmented(real), condition).logits
        penalty = self.shares.share * losses.r1(logits, real)
        self.apply("discriminator", penalty * (self.config.r1_gamma * self.config.r1_every))
        return {"r1": penalty}

    def path_update(self, batch: Batch) -> dict[str, Tensor]:
        """The path length's own update on half a batch, weighed for the steps it stands for."""
        half = max(1, len(batch["image"]) // 2)
        part = {name: value[:half] for name, value in batch.items()}
        with torch.no_grad():
            condition = self.condition(part, self.draw_text(part))
        generator = self.model.generator
        with autocast(self.config.precision, self.device):
            ws = self.mixed_ws(half)
            images = generator.synthesis(ws, condition, **self.grain)
        lengths = losses.path_lengths(images, ws, self.shares.randn_like(images))
        (mean,) = self.ranks.average([self.shares.share * lengths.detach().mean()])
        self.path_mean = self.path_mean.lerp(mean, 0.01)
        penalty = self.shares.share * (lengths - self.path_mean).square().mean()
        self.apply("generator", penalty * (self.config.path_weight * self.config.path_every))
        return {"path": self.path_mean}

    # their parts

    def noise(self, count: int) -> Noise:
        return Noise(*map(self.shares.own, self.whole_noise(self.shares.whole(count))))

    def whole_noise(self, count: int) -> Noise:
        config = self.config.model
        return draw_noise(count, config.embedding, form=config.noise, device=self.device)

    def draw_text(self, batch: Batch) -> Tensor:
        """A text embedding [B, D] of each picture: of a caption where it is labelled."""
        noise = self.noise(len(batch["image"]))
        return self.with_captions(batch, self.pseudo_text(batch).sample(noise), noise)

    def pseudo_text(self, batch: Batch) -> Any:
        """The distribution of text embeddings that pictures without captions are given."""
        return self.model.prior(batch["centre"])

    def with_captions(self, batch: Batch, pseudo: Tensor, noise: Noise) -> Tensor:
        """Pseudo texts [B, D], and those of captions, a little perturbed, where they are known."""
        if not self.config.label_fraction:
            return pseudo
        share = self.config.text_noise
        blurred = (1 - share) * batch["text"] + share * F.normalize(noise.direction, dim=1)
        return torch.where(batch["labelled"][:, None], F.normalize(blurred, dim=1), pseudo)

    def condition(self, batch: Batch, text: Tensor) -> Tensor:
        """What the networks are given of texts [B, D]."""
        return self.model.condition(text)

    def mixed_ws(self, count: int) -> Tensor:
        """Rows of w [B, num_ws, w_dim], of two noises where styles are mixed."""
        generator, width = self.model.generator, self.config.model.z_dim
        rows = generator.num_ws
        cut = rows
        if torch.rand(()).item() < self.config.style_mixing:
            cut = int(torch.randint(1, rows, ()).item())
        first = generator.mapping(self.shares.randn(count, width, device=self.device))[:, None]
        if cut == rows:
            return first.expand(-1, rows, -1)
        second = generator.mapping(self.shares.randn(count, width, device=self.device))[:, None]
        return torch.cat([first.expand(-1, cut, -1), second.expand(-1, rows - cut, -1)], 1)

    def draw_pictures(self, condition: Tensor) -> Tensor:
        ws = self.mixed_ws(len(condition))
        return self.laid_out(self.synthesis(ws, condition, **self.grain))

    def see(self, fake: Tensor) -> Tensor:
        """Embeddings [B, D] of a random square of drawn pictures, differentiable to them."""
        square = random_square(fake, self.config.smallest_crop)
        with autocast(self.config.precision, self.device):
            return self.encoder.embed_images(square / 2 + 0.5).float()

    def contrast(self, images: Tensor, text: Tensor) -> Tensor:
        config = self.config
        return losses.pseudo_text_loss(
            images,
            text,
            temperature=config.temperature,
            text_share=config.text_share,
            sharpened=config.contrast == "sharpened",
            group=self.ranks.group,
        )

    def augmented(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] as the discriminator sees them, each changed anew."""
        if self.config.augment:
            drawn = self.shares.own(draw(self.shares.whole(len(images)), device=self.device))
            images = augment(images / 2 + 0.5, self.config.augment, parameters=drawn) * 2 - 1
        return self.laid_out(images)

    def laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    def apply(self, player: str, loss: Tensor) -> None:
        """One update of a player by a loss."""
        parameters = list(self.players[player].network.parameters())
        self.update({player: gradients(loss, parameters)})

    def update_average(self) -> None:
        """Moves the generator's average; its half-life grows with what has been seen."""
        config, batch = self.config, self.config.batch_size
        half_life = float(config.ema_images)
        if config.ema_ramp:
            half_life = min(half_life, config.ema_ramp * batch * (self.ema.updates + 1))
        self.ema.decay = 0.5 ** (batch / half_life)
        self.ema.update(self.model.generator)

    @cached_property
    def stands_on(self) -> dict[str, str]:
        return {**super().stands_on, ENCODER: self.fingerprint}

    def state_dict(self) -> State:
        return {**super().state_dict(), "path_mean": self.path_mean, "done": self.done}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.path_mean = state["path_mean"].to(self.device)
        self.done = state["done"]
