"""How a map from one space of codes to another is trained: by a GAN, by MMD-GAN, or by plain MMD.

x are codes of the target space, y = G(source codes); no x is anybody's y.

    "gan"      D(x) real, D(y) fake; G: D(y) real                        image to text
               D ascends mean D(x) - mean D(y), weights clipped (WGAN)   text to image
    "mmd_gan"  f, g ascend L(f(x), f(y)) - a |g(f(x)) - x|^2 - a |g(f(y)) - y|^2; G descends L
    "mmd"      G descends sqrt(MMD^2(x, y))

L is `fastxm.losses.mmd_gan_g`; squares are means. Widths, step sizes and schedules are those of the
released code (Das & Saha, arXiv:2112.04928); where it would take a logarithm of raw scores, for
text to image, this is the WGAN of its comments. (Arjovsky et al., ICML 2017; C.-L. Li et al., NIPS
2017; Y. Li et al., ICML 2015.) MMD-GAN's critic can be kept flat by spectral normalisation (Miyato
et al., ICLR 2018) instead of clamped weights, and so can that of the GAN to text.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastxm import losses
from fastxm.nn.mlp import mlp
from fastxm.nn.spectral import SpectralLinear, normalised_once
from fastxm.nn.stackgan import orthogonal_
from fastxm.ops.mmd import Kernel
from fastxm.training.recipe import Player

Source = Callable[[], Tensor]  # the next codes [B, D]
CLIP = 5.0  # largest norm of a gradient
CLAMP = 0.01  # largest weight of a critic that is kept flat by clipping


@dataclass(frozen=True)
class MMDGANConfig:
    """How MMD-GAN's maps are trained."""

    critic: Literal["clamped", "spectral"] = "clamped"
    """How its encoder is kept flat: weights of at most 0.01 (released), or layers divided by
    their largest singular value."""
    width: int = 512
    """Of the critic's hidden layers."""
    steps: tuple[int, int] = (100, 5)
    """Updates of the critic to one of the map: at its first 25 and every 500th, and else."""
    rank_weight: float = 16.0
    """Weight of the one-sided term."""
    lr: float | None = None
    """Adam's step before `lr_scale`; published: 2e-4 to text codes, 2e-5 to image codes."""

    def __post_init__(self) -> None:
        if self.critic not in ("clamped", "spectral"):
            raise ValueError(f"critic is clamped or spectral, not {self.critic!r}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, not {self.width}")
        if len(self.steps) != 2 or min(self.steps) < 1:
            raise ValueError(f"steps are two, each at least 1, not {self.steps}")
        if not self.rank_weight >= 0:
            raise ValueError(f"rank_weight must be at least 0, not {self.rank_weight}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")


class Mapper(ABC):
    """A map between two spaces of codes and what trains it.

    Args:
        network: the map, [B, A] -> [B, D].
        kernel: of MMD.
        lr_scale: factor of the published step sizes.
        mmd_gan: what that family has of its own.
        gan_critic: of the GAN to text, "free" or "spectral".

    Attributes:
        players: the map, "mapper", and its critic if it has one.
        updates: of the map so far.
    """

    def __init__(
        self,
        network: nn.Sequential,
        kernel: Kernel,
        lr_scale: float = 1.0,
        mmd_gan: MMDGANConfig | None = None,
        gan_critic: str = "free",
    ):
        self.network, self.kernel, self.lr_scale = network, kernel, lr_scale
        self.mmd_gan, self.gan_critic = mmd_gan or MMDGANConfig(), gan_critic
        self.updates = 0
        # a loss of the map itself that joins each of its updates
        self.anchor: Callable[[nn.Module], Tensor] = lambda network: torch.zeros(())
        self.players: dict[str, Player] = {}
        self.build()

    @property
    def widths(self) -> tuple[int, int]:
        """A and D."""
        linear = [layer for layer in self.network if isinstance(layer, nn.Linear)]
        return linear[0].in_features, linear[-1].out_features

    @abstractmethod
    def build(self) -> None:
        """Initial weights, the critic and the optimisers."""

    @abstractmethod
    def step(self, real: Source, source: Source) -> dict[str, Tensor]:
        """One scheduled update of the map, after those of its critic.

        Args:
            real: draws codes of the target space.
            source: draws codes of the other one, on its own.

        Returns:
            the losses of the last updates, scalars.
        """

    def adam(self, network: nn.Module, lr: float, betas: tuple[float, float]) -> Player:
        lr *= self.lr_scale
        return Player(network, torch.optim.Adam(network.parameters(), lr, betas, fused=True))

    def update(self, name: str, loss: Tensor) -> Tensor:
        """Descends one player's loss; the others' gradients are left alone."""
        player = self.players[name]
        parameters = list(player.network.parameters())
        player.take(torch.autograd.grad(loss, parameters))
        nn.utils.clip_grad_norm_(parameters, CLIP)
        player.optimizer.step()
        player.optimizer.zero_grad()
        return loss.detach()

    def update_map(self, loss: Tensor) -> Tensor:
        self.updates += 1
        self.update("mapper", loss + self.anchor(self.network))
        return loss.detach()

    @torch.no_grad()
    def fake(self, source: Source) -> Tensor:
        """Mapped codes, constants to the critic."""
        return self.network(source())


class MMDMapper(Mapper):
    """Descends the root of MMD^2 between codes and mapped codes (as GMMN does)."""

    def build(self) -> None:
        normal_(self.network)
        self.players = {"mapper": self.adam(self.network, 2e-4, (0.5, 0.999))}

    def step(self, real: Source, source: Source) -> dict[str, Tensor]:
        loss = losses.mmd_loss(real(), self.network(source()), self.kernel, root=True)
        return {"loss_g": self.update_map(loss)}


class MMDGANMapper(Mapper):
    """Descends what an autoencoding critic ascends.

    The critic's encoder is clamped before each of its updates, or spectrally normalised.
    """

    autoencoder_weight: ClassVar[float]
    lr: ClassVar[float]

    def build(self) -> None:
        (source, target), config = self.widths, self.mmd_gan
        width = config.width
        linear = SpectralLinear if config.critic == "spectral" else nn.Linear
        critic = nn.ModuleDict(
            {
                "encoder": mlp((target, width, width, source), linear=linear),
                "decoder": mlp((source, width, width, target)),
            }
        ).to(next(self.network.parameters()).device)
        normal_(self.network)
        normal_(critic)
        lr, betas = config.lr or self.lr, (0.5, 0.999)
        self.players = {
            "mapper": self.adam(self.network, lr, betas),
            "critic": self.adam(critic, lr, betas),
        }

    @property
    def critic_steps(self) -> int:
        many, few = self.mmd_gan.steps
        return many if self.updates < 25 or self.updates % 500 == 0 else few

    def step(self, real: Source, source: Source) -> dict[str, Tensor]:
        critic = self.players["critic"].network
        encoder, _ = critic.children()
        for _ in range(self.critic_steps):
            if self.mmd_gan.critic == "clamped":
                clamp_(encoder)
            critic_loss = self.update("critic", self.critic_loss(real(), self.fake(source)))
        with normalised_once(encoder):
            fx, fy = encoder(real()), encoder(self.network(source()))
        objective = losses.mmd_gan_g(fx, fy, self.kernel, rank_weight=self.mmd_gan.rank_weight)
        return {"loss_d": critic_loss, "loss_g": self.update_map(objective)}

    def critic_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What the critic descends, of codes x [N, D] and mapped ones y [M, D]."""
        encoder, decoder = self.players["critic"].network.children()
        with normalised_once(encoder):
            fx, fy = encoder(x), encoder(y)
        pairs = ((decoder(fx), x), (decoder(fy), y))
        return losses.mmd_gan_d(
            fx,
            fy,
            pairs,
            self.kernel,
            rank_weight=self.mmd_gan.rank_weight,
            reconstruction_weight=self.autoencoder_weight,
        )


class MMDGANToText(MMDGANMapper):
    """Image codes to text codes."""

    autoencoder_weight, lr = 2.0, 2e-4


class MMDGANToImage(MMDGANMapper):
    """Text codes to image codes."""

    autoencoder_weight, lr = 8.0, 2e-5


class GANToText(Mapper):
    """Image codes to text codes: two updates of the critic, one of the map, more while it loses."""

    losing: ClassVar[float] = 1.5

    def build(self) -> None:
        linear = SpectralLinear if self.gan_critic == "spectral" else nn.Linear
        critic = mlp((self.widths[1], 400, 200, 200, 200, 1), linear=linear)
        critic.to(next(self.network.parameters()).device)
        orthogonal_(self.network)
        orthogonal_(critic)
        self.players = {
            "mapper": self.adam(self.network, 2e-4, (0.5, 0.999)),
            "critic": self.adam(critic, 2e-4, (0.5, 0.999)),
        }

    def step(self, real: Source, source: Source) -> dict[str, Tensor]:
        critic = self.players["critic"].network
        for _ in range(2):
            x, y = real(), self.network(source())
            loss_d = losses.bce(critic(x), True) + losses.bce(critic(y.detach()), False)
            loss_d = self.update("critic", loss_d)
            loss = losses.bce(critic(y), True)
            if loss > self.losing:
                self.update_map(loss)
        loss = self.update_map(losses.bce(critic(self.network(source())), True))
        return {"loss_d": loss_d, "loss_g": loss}


class GANToImage(Mapper):
    """Text codes to image codes: a WGAN with clipped weights, four updates of the critic to one."""

    def build(self) -> None:
        critic = mlp((self.widths[1], 512, 256, 256, 1))
        critic.to(next(self.network.parameters()).device)
        orthogonal_(self.network)
        orthogonal_(critic)
        lr = 5e-5 * self.lr_scale
        self.players = {
            "mapper": Player(self.network, torch.optim.RMSprop(self.network.parameters(), lr)),
            "critic": Player(critic, torch.optim.RMSprop(critic.parameters(), lr)),
        }

    def step(self, real: Source, source: Source) -> dict[str, Tensor]:
        critic = self.players["critic"].network
        for _ in range(4):
            loss_d = critic(self.fake(source)).mean() - critic(real()).mean()
            loss_d = self.update("critic", loss_d)
            clamp_(critic)
        loss = self.update_map(-critic(self.network(source())).mean())
        return {"loss_d": loss_d, "loss_g": loss}


MAPPERS: dict[str, dict[str, type[Mapper]]] = {
    "gan": {"image_to_text": GANToText, "text_to_image": GANToImage},
    "mmd_gan": {"image_to_text": MMDGANToText, "text_to_image": MMDGANToImage},
    "mmd": {"image_to_text": MMDMapper, "text_to_image": MMDMapper},
}


def normal_(network: nn.Module, std: float = 0.1) -> None:
    """Weights from N(0, std^2), biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, std)
            nn.init.zeros_(module.bias)


@torch.no_grad()
def clamp_(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.clamp_(-CLAMP, CLAMP)
