"""A recipe small enough to see through; as a script, it trains in a process that can be killed."""

# ruff: noqa: NPY002 (the legacy global generator is what is tested)
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastxm.training.recipe import Player, Recipe, Samples, State
from fastxm.training.trainer import LoopConfig, train


class Counter:
    """Batches 0, 1, 2, ... as tensors: the position is the state."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.position += 1
            yield torch.full((4, 3), float(self.position % 7))

    def state_dict(self) -> State:
        return {"position": self.position}

    def load_state_dict(self, state: State) -> None:
        self.position = state["position"]


@dataclass(frozen=True)
class ToyConfig:
    width: int


class Toy(Recipe):
    """A linear map and Adam; the loss draws from all three global generators."""

    system = "toy"
    images_per_step = 4
    device = torch.device("cpu")

    def __init__(self, width: int = 3, nan_at: int = -1):
        self.config = ToyConfig(width)
        self.nan_at, self.steps_done = nan_at, 0

    def build(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        network = nn.Linear(3, self.config.width)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        self.players, self.batches = {"net": Player(network, optimizer)}, Counter()

    def step(self, batch: Tensor) -> dict[str, Tensor]:
        player = self.players["net"]
        target = torch.rand(4, 1) + random.random() + np.random.rand()
        loss = (player.network(batch) - target).square().mean()
        self.steps_done += 1
        if self.steps_done == self.nan_at:
            loss = loss * float("nan")
        player.optimizer.zero_grad()
        loss.backward()
        player.optimizer.step()
        return {"loss": loss, "weight": player.network.weight.detach().mean()}

    def sample(self) -> Samples:
        return Samples(torch.rand(2, 3, 8, 8, generator=torch.Generator()), ["one", "two"])

    def export(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "weight.txt").write_text(str(self.players["net"].network.weight.tolist()))


if __name__ == "__main__":
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    loop = LoopConfig(steps=steps, log_every=3, sample_every=50, checkpoint_every=7)
    train(Toy(), folder, loop, resume=True)
