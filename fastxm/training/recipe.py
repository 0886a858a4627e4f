"""What a system brings to the loop: its players, one step, a sample, its state, an export."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastxm.training.config import plain
from fastxm.training.ranks import Ranks

State = dict[str, Any]


class Batches(Protocol):
    """Endless batches whose position can be kept and taken up again."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


@dataclass
class Player:
    """A network and the optimiser that trains it."""

    network: nn.Module
    optimizer: torch.optim.Optimizer

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Makes these the gradients of the network's parameters, in their memory order.

        Fused Adam pairs places, not indices.
        """
        for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient

    def state_dict(self) -> State:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Samples:
    """Pictures to look at.

    Args:
        images: [N, 3, S, S], in [0, 1].
        captions: N texts, printed under the pictures.
    """

    images: Tensor
    captions: list[str]


class Recipe(ABC):
    """A system as the loop sees it.

    `build` fills `players` and `batches`. `step` takes one item of `batches` and returns scalar
    tensors, left on the device. `sample` draws from a generator of its own, so that looking at the
    pictures changes nothing. State beyond players and batches is added in `state_dict`.

    One that `spans` processes takes its rows of each batch by `ranks`, which the loop sets before
    `build`, and returns metrics whose average over ranks is that of the whole batch; `sample` and
    `export` are the first rank's alone.
    """

    system: str
    config: Any  # a dataclass
    unbound: tuple[str, ...] = ()  # fields of config that may change between parts of a run
    # fields, at their defaults, of which runs from before they were there say nothing
    later: tuple[tuple[str, Any], ...] = ()
    images_per_step: int
    device: torch.device
    players: dict[str, Player]
    batches: Batches
    ranks: Ranks = Ranks()
    spans: bool = False

    @abstractmethod
    def build(self) -> None:
        """Networks, optimisers and data, from nothing."""

    def begin(self) -> int:
        """What a run that is not resumed takes over from others, after `build`.

        Returns:
            the step that it is then at.
        """
        return 0

    @abstractmethod
    def step(self, batch: Any) -> dict[str, Tensor]:
        """One update of every player; the metrics are scalar tensors."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Writes the model to sample from."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this recipe to be resumed by it; plain values."""
        fields = plain(self.config)
        bound = {
            name: value
            for name, value in fields.items()
            if name not in self.unbound and (name, value) not in self.later
        }
        return {"system": self.system, **bound}

    def sample(self) -> Samples | None:
        """The same captions from the same noise at every call; None where nothing is drawn."""
        return None

    def held_out(self) -> dict[str, float]:
        """Figures of data that is held out, taken as often as a sample; {} where there are none."""
        return {}

    def state_dict(self) -> State:
        players = {name: player.state_dict() for name, player in self.players.items()}
        return {"players": players, "batches": self.batches.state_dict()}

    def load_state_dict(self, state: State) -> None:
        for name, player in self.players.items():
            player.load_state_dict(state["players"][name])
        self.batches.load_state_dict(state["batches"])
