"""VDL's training, in stages on LAFITE's; a reconstruction (see `fastxm.models.vdl`).

    adversarial    stage 1: LAFITE, with t ~ p(t | z)
    posterior      stage 2a: the networks stay, q learns
                       kx (1 - cos(f(G), z)) + lc C(f(G), t) + beta KL(q || p) / D
    refinement     stage 2b: q stays, LAFITE goes on with t ~ q, and t ~ p for a share of pictures,
                       and with iic C(f(G), z), which stage 1 is without
    joint          instead of 2a and 2b: the losses of both at once, of the same drawings

Pictures with captions that may be learnt from give, instead of a sample, their text, and posterior
and prior learn of batches of such pairs: of -log q(t | x, z) and -log p(t | z), and of finding a
picture's text among the batch's by a sample. The density alone would be content with the mean of
all texts.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastxm.models.vdl import VDL, VDLConfig
from fastxm.nn.directions import Noise
from fastxm.ops import info_nce
from fastxm.training import checkpoint
from fastxm.training.batches import Batch, place
from fastxm.training.gan import PICTURES, gradients
from fastxm.training.joint_data import JointData
from fastxm.training.lafite import Drawn, LAFITERecipe, LAFITETraining
from fastxm.training.precision import autocast
from fastxm.training.recipe import Player, State


@dataclass(frozen=True)
class VDLTraining(LAFITETraining):
    """Everything that decides a training of VDL."""

    model: VDLConfig = field(default_factory=VDLConfig)
    schedule: Literal["staged", "joint"] = "staged"
    """Stages 2a and 2b one after the other, or both at once."""
    stage1: str = ""
    """A run of `train lafite` or `train vdl`, by the same encoder, whose last checkpoint stands in
    for stage 1: the run begins at step adversarial_steps."""
    adversarial_steps: int = 20_000
    """Steps of stage 1; 0 where captions alone are to teach q."""
    picture_weight: float = 0.0
    """iic: of drawn pictures and real ones, in the encoder's space, after stage 1."""
    posterior_steps: int = 5000
    """Steps of stage 2a; stage 2b lasts to the end."""
    posterior_lr: float = 1e-3
    """Adam's step of the posterior; it falls to a tenth in stage 2a."""
    reconstruction_weight: float = 1.0
    """kx: that the drawn picture has the picture's embedding; without kx and lc nothing is drawn in
    stage 2a."""
    alignment_weight: float = 1.0
    """lc: that the drawn picture matches the sampled text."""
    kl_weight: float = 0.1
    """beta, of the KL divided by the embedding's width."""
    kl_warmup: float = 0.2
    """Share of stage 2a in which beta rises from 0."""
    kl_target: float = 0.0
    """Nats a picture that beta is moved to hold; 0 keeps beta."""
    supervision_weight: float = 4.0
    """alpha: of -log q and -log p of known texts, divided by the embedding's width."""
    ranking_weight: float = 1.0
    """Of telling known texts apart by samples of q and of p: InfoNCE at the encoder's
    temperature."""
    supervision_batch: int = 256
    """Pictures with captions that posterior and prior learn from in a step, of all processes."""
    prior_share: float = 0.5
    """Share of the pictures in stage 2b whose text is drawn from p."""
    drop_image: float = 0.3
    """Share of the pictures whose embedding is hidden where networks are given pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"adversarial_steps": 0, "posterior_steps": 1, "supervision_batch": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, not {getattr(self, name)}")
        for name in ("kl_warmup", "prior_share", "drop_image"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is in [0, 1], not {getattr(self, name)}")
        if not self.posterior_lr > 0:
            raise ValueError(f"posterior_lr must be above 0, not {self.posterior_lr}")
        weights = ("kl_weight", "kl_target", "supervision_weight", "ranking_weight")
        for name in (*weights, "reconstruction_weight", "alignment_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


class VDLRecipe(LAFITERecipe):
    """VDL as the loop sees it.

    Args:
        config: of the training.
    """

    system = "vdl"
    model_class = VDL
    model: VDL
    unbound = (*LAFITERecipe.unbound, "stage1")

    def __init__(self, config: VDLTraining) -> None:
        super().__init__(config)
        self.multiplier = 1.0  # of beta, where a target holds the KL

    def begin(self) -> int:
        if self.config.stage1:
            self.take(Path(self.config.stage1))
        return self.done

    def take(self, run: Path) -> None:
        """Begins after stage 1, with the networks, optimisers and averages of another run.

        Raises:
            ValueError: there is none, its networks or encoder are not the configuration's, or no
                step is left after it.
        """
        steps, first = self.config.loop.steps, self.config.adversarial_steps
        if steps <= first:
            raise ValueError(
                f"stage1: the loop's steps count those of stage 1, adversarial_steps {first}: "
                f"of {steps} none is left"
            )
        kept = checkpoint.steps(run / "checkpoints")
        if not kept:
            raise ValueError(f"stage1: {run} has no checkpoint")
        state = checkpoint.read(kept[-1])["recipe"]
        theirs = {k: v for k, v in state.get("stands_on", {}).items() if k != PICTURES}
        self.compare(theirs, f"stage1: {kept[-1]}")
        try:
            for name in ("generator", "discriminator"):
                player = self.players[name]
                ours = [
                    {k: group[k] for k in ("lr", "betas")}
                    for group in player.optimizer.param_groups
                ]
                player.load_state_dict(state["players"][name])
                for group, own in zip(player.optimizer.param_groups, ours):
                    group.update(own)
            self.ema.load_state_dict(state["ema"])
            self.path_mean = state["path_mean"].to(self.device)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"stage1: {kept[-1]} is of other networks: {reason}") from error
        self.done = first

    def open_data(self) -> JointData:
        if self.config.label_fraction:
            self.ranks.check(self.config.supervision_batch, "supervision_batch")
        data, c = super().open_data(), self.config.model
        if c.evidence == "encoder" and data.encoder.evidence_width != c.evidence_width:
            raise ValueError(
                f"the encoder gives evidence of width {data.encoder.evidence_width}, "
                f"the configuration has evidence_width {c.evidence_width}"
            )
        self.logit_scale = 1 / data.encoder.temperature  # read once: it waits for a GPU
        return data

    def make_players(self) -> dict[str, Player]:
        heads = nn.ModuleList([self.model.posterior_heads])
        if self.config.label_fraction:
            heads.append(self.model.prior_heads)
        adam = torch.optim.Adam(heads.parameters(), self.config.posterior_lr, fused=True)
        return {**super().make_players(), "posterior": Player(heads, adam)}

    def stages(self) -> list[tuple[str, int | None]]:
        config = self.config
        first = ("adversarial", config.adversarial_steps)
        if config.schedule == "joint":
            return [first, ("joint", None)]
        return [first, ("posterior", config.posterior_steps), ("refinement", None)]

    def posterior_step(self, batch: Batch, done: int) -> dict[str, Tensor]:
        """Stage 2a: one update of the posterior, and of the prior where captions are known."""
        progress = done / self.config.posterior_steps
        for group in self.players["posterior"].optimizer.param_groups:
            group["lr"] = self.config.posterior_lr * 0.1**progress
        q = self.posterior(batch)
        loss, parts = self.posterior_loss(batch, q, progress)
        if any(self.drawn_weights.values()):
            noise = self.noise(len(batch["image"]))
            text = self.with_captions(batch, q.sample(noise), noise)
            with autocast(self.config.precision, self.device):
                fake = self.draw_pictures(self.condition(batch, text))
            drawn = self.seen_losses(fake, text, batch, self.drawn_weights)
            loss = sum((self.drawn_weights[name] * part for name, part in drawn.items()), loss)
            parts = {**drawn, **parts}
        self.apply("posterior", loss)
        return {"loss_q": loss, **parts}

    @property
    def drawn_weights(self) -> dict[str, float]:
        """Of what the posterior loses when its samples are drawn."""
        config = self.config
        return {"q_picture": config.reconstruction_weight, "q_text": config.alignment_weight}

    def seen_weights(self) -> dict[str, float]:
        weights, (name, _) = super().seen_weights(), self.stage()
        if name == "adversarial":
            weights["g_picture"] = 0.0
        return weights | self.drawn_weights if name == "joint" else weights

    def seen_loss(self, name: str, seen: Tensor, text: Tensor, batch: Batch) -> Tensor:
        if name == "q_picture":
            return self.shares.share * (1 - (seen * batch["embedding"]).sum(1)).mean()
        return super().seen_loss(name, seen, text, batch)

    def refinement_step(self, batch: Batch, done: int) -> dict[str, Tensor]:
        """Stage 2b: a step of LAFITE on samples of the posterior."""
        return self.adversarial_step(batch, done)

    def joint_step(self, batch: Batch, done: int) -> dict[str, Tensor]:
        """Stages 2a and 2b at once."""
        return self.adversarial_step(batch, done)

    def generator_update(self, batch: Batch) -> tuple[dict[str, Tensor], Drawn]:
        name, done = self.stage()
        if name != "joint":
            return super().generator_update(batch)
        text = self.draw_text(batch)
        loss, parts, drawn = self.generator_loss(batch, text)
        own, more = self.posterior_loss(
            batch, self.posterior(batch), done / self.config.posterior_steps
        )
        players = {name: self.players[name] for name in ("generator", "posterior")}
        networks = {name: list(player.network.parameters()) for name, player in players.items()}
        whole = gradients(loss + own, [p for group in networks.values() for p in group])
        count = len(networks["generator"])
        self.update({"generator": whole[:count], "posterior": whole[count:]})
        return {"loss_g": loss, "loss_q": own, **parts, **more}, drawn

    def posterior_loss(
        self, batch: Batch, q: Any, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The KL, and the densities of known texts, as weighed; and what to log of them."""
        config, width = self.config, self.config.model.embedding
        p = self.model.prior(batch["centre"])
        kl = q.kl(p)
        counts = (~batch["labelled"]).to(kl.dtype)
        some, every = self.ranks.average([counts.sum(), torch.ones_like(counts).sum()])
        found = some > 0  # of all, where none is without a caption
        mean = (kl * torch.where(found, counts, 1.0)).sum() / torch.where(found, some, every)
        beta = config.kl_weight * self.multiplier
        if config.kl_warmup:
            beta *= min(1.0, progress / config.kl_warmup)
        loss = beta * mean / width
        metrics = {"kl": mean, "beta": mean.new_full((), beta)}
        if config.label_fraction:
            supervision, more = self.supervision()
            loss, metrics = loss + supervision, metrics | more
        if config.kl_target:
            self.hold(self.ranks.average([mean.detach()])[0].item())
        return loss, metrics

    def supervision(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What posterior and prior lose on known texts, and its parts."""
        config = self.config
        pairs = self.batches.embeddings.pairs(config.supervision_batch)
        known = {name: place(self.ranks.own(rows), self.device) for name, rows in pairs.items()}
        noise = Noise(*map(self.ranks.own, self.whole_noise(config.supervision_batch)))
        text, share = known["text"], self.ranks.share(config.supervision_batch)
        loss, parts = text.new_zeros(()), {}
        of_both = {"q": self.posterior(known), "p": self.model.prior(known["centre"])}
        for name, found in of_both.items():
            parts[f"log_{name}"] = share * found.log_density(text).mean()
            loss = loss - config.supervision_weight * parts[f"log_{name}"] / text.shape[1]
            if config.ranking_weight:
                sample = found.sample(noise)
                options = {"labels": known["index"], "group": self.ranks.group}
                rank = info_nce(sample, text, self.logit_scale, symmetric=False, **options)
                parts[f"rank_{name}"] = rank
                loss = loss + config.ranking_weight * rank
        return loss, parts

    def hold(self, kl: float) -> None:
        """One step of dual ascent: beta grows while the KL is above its target."""
        target = self.config.kl_target
        step = max(-1.0, min(1.0, (kl - target) / target))
        self.multiplier = min(1e3, max(1e-3, self.multiplier * math.exp(0.05 * step)))

    def posterior(self, batch: Batch) -> Any:
        return self.model.posterior(batch["embedding"], batch["evidence"], batch["centre"])

    def draw_text(self, batch: Batch) -> Tensor:
        """A text embedding [B, D] of each picture, as the stage has it."""
        name, _ = self.stage()
        if name == "adversarial":
            return super().draw_text(batch)
        noise = self.noise(len(batch["image"]))
        own = self.posterior(batch).sample(noise)
        with torch.no_grad():
            common = self.model.prior(batch["centre"]).sample(noise)
        chosen = self.shares.rand(len(own), 1, device=self.device) < self.config.prior_share
        return self.with_captions(batch, torch.where(chosen, common, own), noise)

    def condition(self, batch: Batch, text: Tensor) -> Tensor:
        image = batch["embedding"]
        if self.config.model.conditioning == "text":
            return self.model.condition(text)
        kept = self.shares.rand(len(image), 1, device=self.device) >= self.config.drop_image
        return self.model.condition(text, image * kept)

    def state_dict(self) -> State:
        return {**super().state_dict(), "multiplier": self.multiplier}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.multiplier = state["multiplier"]
