"""How a map from one space of codes to another is trained: by a GAN, by MMD-GAN, or by plain MMD.

x are codes of the target space, y = G(source codes); no x is anybody's y.

    "gan"      D(x) real, D(y) fake; G: D(y) real                        image to text
               D ascends mean D(x) - mean D(y), weights clipped (WGAN)   text to image
    "mmd_gan"  f, g ascend L(f(x), f(y)) - a |g(f(x)) - x|^2 - a |g(f(y)) - y|^2; G descends L
    "mmd"      G descends sqrt(MMD^2(x, y))

L is `fastxm.losses.mmd_gan_g`; squares are means. Widths, step sizes and schedules are those of the
released code (Das & Saha, arXiv:2112.04928); where it would take a logarithm of raw scores, for
text to image, this is the WGAN of its comments. (Arjovsky et al., ICML 2017; C.-L. Li et al., NIPS
2017; Y. Li et al., ICML 2015.)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastxm import losses
from fastxm.nn.mlp import mlp
from fastxm.nn.stackgan import orthogonal_
from fastxm.ops.mmd import Kernel
from fastxm.training.recipe import Player

Source = Callable[[], Tensor]  # the next codes [B, D]
CLIP = 5.0  # largest norm of a gradient
CLAMP = 0.01  # largest weight of a critic that is kept flat by clipping
HIDDEN = 512


class Mapper(ABC):
    """A map between two spaces of codes and what trains it.

    Args:
        network: the map, [B, A] -> [B, D].
        kernel: of MMD.
        lr_scale: factor of the published step sizes.

    Attributes:
        players: the map, "mapper", and its critic if it has one.
        updates: of the map so far.
    """

    def __init__(self, network: nn.Sequential, kernel: Kernel, lr_scale: float = 1.0):
        self.network, self.kernel, self.lr_scale = network, kernel, lr_scale
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
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
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

    The critic's encoder is clamped before each of its updates, of which `schedule` has so many to
    one of the map at its first 25 and every 500th, and so many else.
    """

    autoencoder_weight: ClassVar[float]
    lr: ClassVar[float]
    schedule: tuple[int, int] = (100, 5)

    def build(self) -> None:
        source, target = self.widths
        critic = nn.ModuleDict(
            {
                "encoder": mlp((target, HIDDEN, HIDDEN, source)),
                "decoder": mlp((source, HIDDEN, HIDDEN, target)),
            }
        ).to(next(self.network.parameters()).device)
        normal_(self.network)
        normal_(critic)
        betas = (0.5, 0.999)
        self.players = {
            "mapper": self.adam(self.network, self.lr, betas),
            "critic": self.adam(critic, self.lr, betas),
        }

    @property
    def critic_steps(self) -> int:
        many, few = self.schedule
        return many if self.updates < 25 or self.updates % 500 == 0 else few

    def step(self, real: Source, source: Source) -> dict[str, Tensor]:
        critic = self.players["critic"].network
        for _ in range(self.critic_steps):
            clamp_(critic.encoder)  # type: ignore[arg-type]
            critic_loss = self.update("critic", self.critic_loss(real(), self.fake(source)))
        fx, fy = critic.encoder(real()), critic.encoder(self.network(source()))  # type: ignore[operator]
        objective = losses.mmd_gan_g(fx, fy, self.kernel)
        return {"loss_d": critic_loss, "loss_g": self.update_map(objective)}

    def critic_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What the critic descends, of codes x [N, D] and mapped ones y [M, D]."""
        encoder, decoder = self.players["critic"].network.children()
        fx, fy = encoder(x), encoder(y)
        pairs = ((decoder(fx), x), (decoder(fy), y))
        weight = self.autoencoder_weight
        return losses.mmd_gan_d(fx, fy, pairs, self.kernel, reconstruction_weight=weight)


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
        critic = mlp((self.widths[1], 400, 200, 200, 200, 1))
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
