"""The moving average of a network's parameters."""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)


class EMA(Generic[N]):
    """Averages parameters as theta_ema <- d theta_ema + (1 - d) theta; buffers are copied.

    Batch normalisation's running statistics therefore stay those of the live network.

    Args:
        network: what is averaged; the average starts as a copy of it.
        decay: d, in [0, 1).
        ramp: starts with d = min(decay, (1 + t) / (10 + t)) at update t, so that a short run does
            not carry its first weights to the end.
    """

    def __init__(self, network: N, decay: float = 0.999, *, ramp: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f"an EMA's decay is in [0, 1), not {decay}")
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.ramp, self.updates = decay, ramp, 0

    @torch.no_grad()
    def update(self, network: N) -> None:
        """Moves the average towards `network`, once after each of its updates."""
        decay = self.decay
        if self.ramp:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        averages: list[Tensor] = list(self.network.parameters())
        parameters: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        if buffers := list(self.network.buffers()):
            torch._foreach_copy_(buffers, list(network.buffers()))
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.updates = state["updates"]
